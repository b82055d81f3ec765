"""How each command that README and docs show is run by a test, or why none runs it.

A command runs in a folder where all that it names is there, and small: `recipes/quickstart.toml`
has 64 images to train on. What must be smaller, or have another name, in the command itself is
replaced as told here.
"""

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field

from shown import COMMANDS

ADDRESS, RECIPE = "{address}", "recipes/quickstart.toml"
"""Of the Ray that is there; what is always replaced so has braces."""


@dataclass(frozen=True)
class Trial:
    """A command as it is shown, and what is done to it."""

    text: str
    swaps: Mapping[str, str] = field(default_factory=dict)
    """Parts of the text, each of which stands in it once, and what stands there instead."""
    more: str = ""
    """What follows it."""
    codes: tuple[int, ...] = (0,)
    """Exit codes that are right."""

    def words(self, **values: str) -> list[str]:
        """As it is run; values: of names in braces."""
        text = self.text
        for old, new in self.swaps.items():
            assert text.count(old) == 1, f"{old!r} in {self.text}"
            text = text.replace(old, new)
        return [word.format(**values) for word in shlex.split(f"{text} {self.more}")]


EXPORT = "asynception export runs/first --out"
TRAIN = f"asynception train {RECIPE}"
COMPARE = f"asynception compare {RECIPE} --modes"

WITHOUT_A_RUN = [
    Trial(f"asynception info {RECIPE}"),
    Trial("asynception info deploy/kuberay/overlays/large/recipe.toml"),
    Trial(
        "asynception info recipes/jft_xception_fc_async.toml --step-s 0.5 --network-gbit 25 "
        "--scaling.num_workers 60"
    ),
    Trial("asynception models"),
    Trial("asynception train --help"),
    Trial("asynception import-keras xception.weights.h5 --model xception --out start.safetensors"),
]

DATA = [
    Trial("asynception data pack images/ --out shards/"),
    Trial("asynception data index shards/ --labels shards/labels.txt --out shards/"),
    Trial("asynception data pack images/ --out shards/ --split val --labels shards/labels.txt"),
    Trial("asynception data check shards/train.manifest.json --decode"),
    Trial(
        "asynception data check shards/train.manifest.json --decode --sha256 --num-workers 8",
        {"--num-workers 8": "--num-workers 2"},
    ),
    Trial(
        "asynception data check 'shards/train-{000000..000099}.tar' --labels shards/labels.txt",
        {"{000000..000099}": "{{000000..000000}}"},
    ),
    Trial("asynception data stats shards/train.manifest.json --out labels.png"),
    Trial("asynception data stats shards/train.manifest.json --out stats.png --csv stats.csv"),
    Trial(
        "asynception data index 's3://bucket/set/train-*.tar' --num-classes 1000 --out manifests/",
        {"'s3://bucket/set/": "'http://{server}/shards/", "train-*": "train-{{000000..000000}}"},
    ),
    Trial(
        "asynception data pack list.csv --images images/ --out shards/",
        {"--out shards/": "--out csv/"},
    ),
    Trial(
        "asynception data pack list.parquet --label-kind ids --out shards/",
        {"--out shards/": "--out parquet/"},
    ),
    Trial(
        "asynception data pack --open-images train-annotations-human-imagelabels.csv "
        "--classes oidv7-class-descriptions.csv --images train/ --out shards/ --min-count 100 "
        "--max-missing 1000 --verify --val-share 0.01 --num-workers 8",
        {
            "--out shards/": "--out open_images/",
            "--min-count 100": "--min-count 1",
            "--val-share 0.01": "--val-share 0.3",
            "--num-workers 8": "--num-workers 2",
        },
    ),
]

ONE_RUN = [
    Trial(f"{TRAIN} --run.name first --scaling.num_servers 2"),
    Trial("asynception train runs/first --resume"),
    Trial("asynception status runs/first"),
    Trial("asynception status runs/first --watch"),
    Trial("asynception status runs/first --json"),
    Trial("asynception evaluate runs/first"),
    Trial(f"{EXPORT} model.safetensors --ema"),
    Trial(f"{EXPORT} first.safetensors --ema"),
    Trial(f"{EXPORT} first.pt2 --ema --format torch-export"),
    Trial(f"{EXPORT} first.onnx --ema --format onnx"),
    Trial(f"{TRAIN} --run.name second --model.weights first.safetensors"),
    Trial(
        "asynception train runs/first --resume --training.epochs 30",
        {"--training.epochs 30": "--training.epochs 3"},
    ),
    Trial(
        "asynception train runs/first --resume --scaling.num_servers 4", more="--training.epochs 4"
    ),
]
"""Each resumed run is given more to do than the one before, or else it would be over at once."""

SETTINGS = [
    Trial(f"{TRAIN} --compute.precision bfloat16"),
    Trial(f"{TRAIN} --wire.pull bfloat16 --wire.push bfloat16 --wire.error_feedback true"),
    Trial(f"{TRAIN} --training.max_s 60", {"--training.max_s 60": "--training.max_s 1"}),
    Trial(
        f"{TRAIN} --training.epochs none --training.samples 5000",
        {"--training.samples 5000": "--training.samples 50"},
    ),
    Trial(
        f"{TRAIN} --training.max_s 25 --pipeline.overlap true",
        {"--training.max_s 25": "--training.max_s 1"},
    ),
    Trial("asynception train recipe.toml --scaling.replicas 1"),
    Trial("asynception train recipe.toml --security.tls auto"),
    Trial(
        "asynception train recipe.toml --ray.address auto --scaling.num_workers 2,6",
        {"auto": ADDRESS, "2,6": "1,2"},
    ),
]

COMPARISONS = [
    Trial(
        f"{COMPARE} async,sync --seeds 3 --out runs/modes",
        {"--seeds 3": "--seeds 1"},
        f"--ray.address {ADDRESS}",
    ),
    Trial(
        f"{COMPARE} async,sync,bounded --seeds 3 --out runs/modes",
        {"--seeds 3": "--seeds 1"},
        f"--ray.address {ADDRESS}",
    ),
    Trial(
        f"{COMPARE} sync,async --budget 10m --slow 1x20 --out runs/slow",
        {"--budget 10m": "--budget 1s", "1x20": "1x2"},
        f"--seeds 1 --ray.address {ADDRESS} --scaling.num_workers 2",
    ),
    Trial("asynception compare runs/modes runs/slow runs/first --out runs/all"),
]
"""Each mode of each is trained once; the second finds two of its three runs there."""

CLUSTER = {
    "starts NAME": Trial(
        "asynception train recipe.toml --ray.address auto --detach",
        {"auto": ADDRESS},
        "--run.name NAME --scaling.num_workers 1,2 --training.epochs 100000",
    ),
    "attaches": Trial("asynception attach runs/NAME"),
    "scales": Trial(
        "asynception scale runs/NAME --num-workers 4", {"--num-workers 4": "--num-workers 1"}
    ),
    "resizes": Trial("asynception scale runs/NAME --num-servers 2"),
    "asks": Trial("asynception status runs/NAME"),
    "stops NAME": Trial("asynception stop runs/NAME"),
    "starts wide": Trial(
        f"{TRAIN} --ray.address auto --detach --run.name wide --model.width 0.5",
        {"auto": ADDRESS, "--model.width 0.5": "--model.width 0.1"},
        "--training.epochs 100000",
    ),
    "starts narrow": Trial(
        f"{TRAIN} --ray.address auto --detach --run.name narrow --model.width 0.25 "
        "--run.placement_timeout_s 3600",
        {"auto": ADDRESS, "--model.width 0.25": "--model.width 0.05"},
    ),
    "stops wide": Trial("asynception stop wide", more=f"--ray.address {ADDRESS}"),
    "watches wide": Trial("asynception status runs/wide --watch"),
}
"""Runs that are on a cluster, and what is said to them."""

DOCTOR = [
    Trial("asynception doctor", codes=(0, 1)),
    Trial(f"asynception doctor {RECIPE}", codes=(0, 1)),
    Trial(
        "asynception doctor RECIPE --address HOST:PORT",
        {"RECIPE": "recipe.toml", "HOST:PORT": ADDRESS},
        codes=(0, 1),
    ),
]
"""Whether all is well here is not what is tested."""

SIMULATE = "python -m asynception.simulate"
BENCHMARK = "python benchmarks/"

PROGRAMS = [
    Trial(f"{SIMULATE} --seed 17"),
    Trial(f"{SIMULATE} --seed 17 --mode sync --harsh"),
    *(
        Trial(f"{SIMULATE} --seeds 1000 {option}", {"--seeds 1000": "--seeds 10"})
        for option in (
            "--replicas 1",
            "--losses",
            "--nodes",
            "--elastic",
            "--notices --replicas 1",
        )
    ),
    Trial(f"{BENCHMARK}policies.py --rounds 31", {"--rounds 31": "--rounds 2"}),
    Trial(f"{BENCHMARK}update.py --rounds 14", {"--rounds 14": "--rounds 2"}, "--work sgd"),
    Trial(f"{BENCHMARK}replicas.py", more="--rounds 2 --seconds 0.1 --lane tcp --workers 1"),
    Trial(f"{BENCHMARK}wire_fuzz.py --cases 1000000", {"--cases 1000000": "--cases 1000"}),
    Trial(f"{BENCHMARK}input.py --images 256", {"--images 256": "--images 4"}, "--rounds 2"),
    Trial(
        f"{BENCHMARK}input.py breakdown --images 64", {"--images 64": "--images 4"}, "--rounds 2"
    ),
    Trial(
        f"{BENCHMARK}input.py wait --images 416 --steps 12",
        {"--images 416": "--images 64", "--steps 12": "--steps 1"},
        "--rounds 2",
    ),
    Trial(
        f"{BENCHMARK}compute_bound.py --rounds 5 --steps 4",
        {"--rounds 5": "--rounds 2", "--steps 4": "--steps 1"},
        "--batch-size 1",
    ),
    Trial(
        f"{BENCHMARK}step.py --size 128 --rounds 5 --threads 1 --variant nchw --variant bfloat16",
        {"--size 128": "--size 75", "--rounds 5": "--rounds 2"},
        "--model xception --batch-size 1",
    ),
]
"""Two small rounds each, since some compute quartiles."""

TUTORIAL = "tests/e2e/test_examples.py"
SUITE = "the suite itself, or a step of it"

ELSEWHERE = {
    "python draw.py": TUTORIAL,
    "asynception info recipe.toml": TUTORIAL,
    "asynception train recipe.toml --run.name first": TUTORIAL,
    "asynception export runs/first --out shapes.safetensors --ema": TUTORIAL,
    "asynception train runs/first --resume --training.epochs 5": TUTORIAL,
    "cp -r examples/shapes ~/shapes && cd ~/shapes": TUTORIAL,
    'export PATH="$PWD/.venv/bin:$PATH"': TUTORIAL,
    "make venv": SUITE,
    "make test": SUITE,
    "make test-long": SUITE,
}
"""Commands that another test runs, as they stand."""

MINUTES = "trains for minutes to hours; {} is run, with other settings"
OF_COMPARE = MINUTES.format("each option of compare above")
KUBERNETES = (
    "needs Kubernetes; tests/unit/test_deploy_kuberay.py holds the manifests to its schemas"
)
DOCKER = "needs a Docker engine"
RAY_CLUSTER = "needs a Ray cluster with its dashboard; `make cluster-demo` submits a job to one"
CLOUD = "needs an account with a cloud"
EXAMPLE = f"{COMPARE} async,sync,averaging,allreduce --seeds 3 --budget 25s"
LIKEWISE = (
    "--consistency.local_steps 16 --run.log_every_s 1 --evaluation.every_epochs 1 "
    "--checkpoint.every_s none --out runs"
)
FOUR = "--scaling.num_workers 4 --scaling.resources_per_worker.CPU 0.4"
FASHION = (
    "asynception compare recipes/fashion_mnist.toml --modes async,sync --seeds 3 --samples 60000"
)
FASHION_REST = (
    "--schedule.length 1 --evaluation.every_epochs 0.5 --checkpoint.every_s none --out runs/fashion"
)
STEP = f"{BENCHMARK}step.py"

NOT_RUN = {
    "make train": MINUTES.format("train"),
    "make simtest SEEDS=1000": "takes minutes; the program that it starts is run",
    f"{EXAMPLE} {LIKEWISE}/two": OF_COMPARE,
    f"{EXAMPLE} --slow 1x20 {LIKEWISE}/two_slow": OF_COMPARE,
    f"{EXAMPLE} {FOUR} {LIKEWISE}/four": OF_COMPARE,
    f"{EXAMPLE} --slow 1x20 {FOUR} {LIKEWISE}/four_slow": OF_COMPARE,
    f"{FASHION} --schedule.lr 0.03 {FASHION_REST}-0.03": OF_COMPARE,
    f"{FASHION} --schedule.lr 0.1 {FASHION_REST}-0.1": OF_COMPARE,
    "asynception compare recipe.toml --modes async,sync --seeds 3 --out runs/modes": OF_COMPARE,
    "apt-get install dataset-fashion-mnist": "changes the machine",
    "pip install resvg-py": "changes the environment; tests have it",
    "asynception data pictograms --out DIR": "fetches 100 MB from npm, and draws for minutes",
    "asynception data pictograms --out pictograms": "fetches 100 MB from npm, draws for minutes",
    "asynception train recipes/pictograms.toml --data.train 'DIR/train-*.tar' "
    "--data.val 'DIR/val-*.tar'": "needs the pictograms, and trains for hours",
    f"{BENCHMARK}paper_figures.py --data pictograms --out docs/paper_figures --seeds 2 "
    "--epochs 3": "needs the pictograms, and trains for hours",
    f"{STEP} --size 128 --rounds 5 --threads 2 --variant nchw --variant bfloat16": (
        "as with one thread, which is run"
    ),
    f"{STEP} --size 299 --rounds 3 --threads 2 --variant nchw --variant bfloat16": (
        "takes minutes; smaller images are run"
    ),
    f"{STEP} --model xception --size 128 --rounds 3 --threads 1 --breakdown": (
        "takes minutes with torch's profiler; without it, it is run"
    ),
    f"{STEP} --model xception --size 299 --rounds 3 --threads 2 --breakdown": (
        "takes minutes; smaller images are run"
    ),
    f"{TRAIN} --training.max_s 25 --pipeline.overlap false": "as with true, which is run",
    f"{COMPARE} async,sync --seeds 3 --samples 60000 --out runs/modes": (
        "as without --samples, which is run"
    ),
    "asynception export runs/full --out timm.safetensors --ema --format timm": (
        "needs a run of the whole Xception; tests/unit/test_export.py exports one"
    ),
    "asynception doctor RECIPE": "as with the quickstart's, which is run",
    f"asynception doctor {RECIPE} --address '$RAY_ADDRESS'": "as with HOST:PORT, which is run",
    f"{BENCHMARK}transport.py --rounds 5": "takes hours with 22.9 M parameters, and needs peers",
    f"{BENCHMARK}two_hosts.py --rounds 5": "as root, for minutes, with 22.9 M parameters",
    f"{BENCHMARK}two_hosts.py --ray --rounds 5": "as root, for minutes, with 22.9 M parameters",
    f"{BENCHMARK}transport_report.py transport.log two_hosts.log --out docs/transport": (
        "needs the logs of these two; tests/unit/test_transport_bars.py reads their rows"
    ),
    f"{BENCHMARK}faults.py --rounds 3": "takes an hour; tests/e2e/test_hosts.py runs one round",
    f"{BENCHMARK}faults.py --rounds 3 --replicas 1 --together": (
        "takes an hour; tests/e2e/test_hosts.py runs one round"
    ),
    "pip install atheris": "changes the environment",
    f"{BENCHMARK}fuzz.py --runs 5000000 --seconds 75": (
        "needs atheris, for minutes; tests/unit/test_fuzz_targets.py calls what it calls"
    ),
    f"{BENCHMARK}faults.py --fault 'kill host' --mode bounded": (
        "takes minutes; tests/e2e/test_hosts.py runs one round of it"
    ),
    "docker build -f deploy/docker/Dockerfile --build-arg VARIANT=cuda -t asynception:cuda .": (
        DOCKER
    ),
    "docker build -f deploy/docker/Dockerfile --build-arg VARIANT=cpu -t asynception:cpu .": DOCKER,
    "docker push asynception:cuda": DOCKER,
    "docker run --rm --shm-size 512m asynception:cpu asynception train "
    "/usr/share/asynception/recipes/quickstart.toml": DOCKER,
    "export RAY_AUTH_MODE=token": "a variable for what follows, which is not run",
    "sbatch --nodes 4 --gpus-per-node 4 --cpus-per-task 32 deploy/slurm/train.sbatch "
    "recipes/quickstart.toml /shared/runs --scaling.num_workers 16 --scaling.num_servers 4 "
    "--scaling.use_gpu true": "needs Slurm; tests/unit/test_deploy_launchers.py runs the script",
}
STARTS_OF_NOT_RUN = {
    "kubectl ": KUBERNETES,
    "export RAY_AUTH_TOKEN=": KUBERNETES,
    "ray job ": RAY_CLUSTER,
    "ray start ": "needs a host for each node; `make cluster-demo` starts them on three",
    "ray up ": CLOUD,
    "ray down ": CLOUD,
    "ray dashboard ": CLOUD,
    "ray rsync-down ": CLOUD,
    "ray get-auth-token ": "writes a secret into the home folder",
    "aws ": CLOUD,
    "gcloud ": CLOUD,
}
"""Whole programs that need what isn't here."""

TRIALS = [
    *WITHOUT_A_RUN, *DATA, *ONE_RUN, *SETTINGS, *COMPARISONS, *CLUSTER.values(), *DOCTOR, *PROGRAMS,
]  # fmt: skip
SHOWN = {shown.text for shown in COMMANDS}


def reason_not_to_run(text: str) -> str | None:
    """Why no test runs a command; None if one does."""
    starts = (why for start, why in STARTS_OF_NOT_RUN.items() if text.startswith(start))
    return NOT_RUN.get(text) or next(starts, None)


def summary() -> str:
    """How many commands are shown, and what becomes of them."""
    not_run = sum(reason_not_to_run(text) is not None for text in SHOWN)
    return (
        f"commands in README and docs: {len(SHOWN)}, of which tests run "
        f"{len(SHOWN) - not_run}; {not_run} need what isn't here (tests/documented.py)"
    )
