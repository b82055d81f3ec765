"""TCP's congestion control."""

from pathlib import Path

from asynception.doctor.finding import Verdict, ok, warn

_FOLDER = Path("/proc/sys/net/ipv4")


def measure_congestion() -> Verdict:
    try:
        current = (_FOLDER / "tcp_congestion_control").read_text().strip()
        available = (_FOLDER / "tcp_available_congestion_control").read_text().split()
    except OSError:
        return ok("this system doesn't say")
    return judge_congestion(current, available)


def judge_congestion(current: str, available: list[str]) -> Verdict:
    """BBR paces what it sends, which within a host costs up to half of the speed.

    The tcp lane does without on loopback by itself; gRPC and Ray have no such choice.
    """
    if not current.startswith("bbr"):
        return ok(current)
    other = next((name for name in ("cubic", "reno") if name in available), "cubic")
    return warn(
        f"{current}: 1.6-1.8 times slower on loopback, but for the tcp lane, which does without",
        f"sysctl -w net.ipv4.tcp_congestion_control={other}, if all traffic stays in one network",
    )
