"""What a run with replicas publishes of its standbys, from made-up progress."""

import re

from test_monitoring import Run, shown

from ps.messages import ReplicaStatus


def test_a_promoted_standby_begins_to_count_where_its_primary_ended(tmp_path):
    run = Run(tmp_path)
    run.shards.apply_s = 50.0
    run.shards.replicas = [ReplicaStatus(1, "in_step", waited_s=30.0)] * 2
    run.progress(2.0)
    run.progress(2.0)
    run.shards.apply_s = 1.0
    run.shards.replicas = [ReplicaStatus(2, "none", waited_s=0.5)] * 2
    run.progress(2.0)
    run.progress(2.0)
    last = run.metrics.spans[-1].shards[0]
    assert (last.apply_s, last.queue_s, last.standby_s) == (1.0, 0.5, 0.5)


def test_a_shard_without_a_standby_in_step_stands_out(tmp_path):
    run = Run(tmp_path)
    run.progress(2.0)
    assert "standby" not in shown(run.status)
    run.shards.replicas = (
        ReplicaStatus(3, "in_step", 1, 0.004),
        ReplicaStatus(5, "seeding", 8, 2.5),
    )
    run.progress(2.0)
    run.progress(2.0)
    first, second = (each["standby"] for each in run.status["shards"])
    assert first == {"state": "in_step", "num_behind": 1, "waiting_s": 0.004}
    assert second == {"state": "seeding", "num_behind": 8, "waiting_s": 2.5}
    text = shown(run.status)
    assert re.search(r"^ +0 .* in step *$", text, re.M)
    assert re.search(r"^ +1 .* seeding, 8 behind for 2 s *$", text, re.M)
    run.shards.replicas = (ReplicaStatus(3, "in_step"), None)
    run.progress(2.0)
    run.progress(2.0)
    assert re.search(r"^ +1 .* - *$", shown(run.status), re.M)
    run.shards.replicas = (ReplicaStatus(3, "in_step"), ReplicaStatus(5, "none"))
    run.progress(2.0)
    run.progress(2.0)
    many = {**run.status, "shards": [run.status["shards"][number == 29] for number in range(30)]}
    many["shards"] = [{**each, "shard": number} for number, each in enumerate(many["shards"])]
    assert re.search(r"^ +29 .* none *$", shown(many), re.M)
