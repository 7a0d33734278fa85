"""What Ray Train calls on each worker. Train's controller loads it as well, so it imports nothing: torch and what comes
with it would cost each start of a phase seconds."""


def train_on_worker(job: dict) -> None:
    """Train what is left of a phase."""
    from ray_pipeline.training.phase import train_phase

    train_phase(job)
