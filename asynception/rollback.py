"""What a run that diverged and was taken back goes on with."""

from dataclasses import replace

from asynception.plan import RunPlan


def lr_factor(plan: RunPlan, num_rollbacks: int) -> float:
    """What so many rollbacks multiply the learning rate by."""
    return float(plan.config.training.rollback_lr_factor**num_rollbacks)


def slowed(plan: RunPlan, num_rollbacks: int) -> RunPlan:
    """The plan with the learning rate that so many rollbacks leave."""
    if not num_rollbacks:
        return plan
    lr = plan.config.schedule.lr * lr_factor(plan, num_rollbacks)
    schedule = plan.config.schedule.model_copy(update={"lr": lr})
    config = plan.config.model_copy(update={"schedule": schedule})
    return replace(plan, model=replace(plan.model, config=config))
