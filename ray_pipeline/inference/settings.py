"""What `ray-pipeline sample` is asked for, and what of it cannot be meant."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ray_pipeline.errors import UserError
from ray_pipeline.inference.hint_images import Intensity
from ray_pipeline.inference.prior import DEFAULT_WEIGHTS

MOST_STEPS = 10_000


@dataclass(frozen=True)
class SamplerSettings:
    """How tiles are drawn; names and defaults as in `ray-pipeline sample --help`. guidance: 1 is none."""

    sampler: str = "heun"
    steps: int = 32
    churn: float = 0.0
    churn_min: float = 0.0
    churn_max: float = math.inf
    churn_noise: float = 1.0
    guidance: float = 1.0
    guidance_interval: tuple[float, float] = (0.0, math.inf)

    @property
    def calls(self) -> int:
        """Network evaluations for a tile, without those of a guide."""
        return self.steps if self.sampler == "euler" else 2 * self.steps - 1

    def has_defaults(self, names: Sequence[str]) -> bool:
        """Whether all these settings are as they are by default."""
        return all(getattr(self, name) == getattr(SamplerSettings, name) for name in names)

    def check(self) -> None:
        """UserError for numbers that no sampler takes."""
        low, high = self.guidance_interval
        wrong = {
            f"--steps {self.steps}: expected 2 to {MOST_STEPS}": not 2 <= self.steps <= MOST_STEPS,
            f"--churn {self.churn}: expected a finite number of at least 0": not 0 <= self.churn < math.inf,
            f"--churn-min {self.churn_min} --churn-max {self.churn_max}: expected 0 <= min <= max": not 0
            <= self.churn_min
            <= self.churn_max,
            f"--churn-noise {self.churn_noise}: expected a finite number above 0": not 0 < self.churn_noise < math.inf,
            f"--guidance {self.guidance}: expected a finite number of at least 0": not 0 <= self.guidance < math.inf,
            f"--guidance-interval {low} {high}: expected 0 <= LO < HI": not 0 <= low < high,
        }
        for message, is_wrong in wrong.items():
            if is_wrong:
                raise UserError(f"{message}; change it")


@dataclass(frozen=True)
class SampleJob:
    """What to sample; names and defaults as in `ray-pipeline sample --help`. seeds: one tile each, and of each image
    where there are hints."""

    weights_path: str
    out: Path
    seeds: tuple[int, ...]
    sampler: SamplerSettings = field(default_factory=SamplerSettings)
    batch_size: int = 4
    weights: str = DEFAULT_WEIGHTS
    vae: str | None = None
    guide: str | None = None
    guide_weights: str = DEFAULT_WEIGHTS
    hints: Mapping[str, Path] = field(default_factory=dict)
    strength: Mapping[str, float] = field(default_factory=dict)
    dataset: str | None = None
    channel: int | None = None
    intensity: Intensity | None = None
    device: str = "auto"
    precision: str = "auto"

    def check(self) -> None:
        """UserError for values that cannot be meant, whatever the weights are."""
        self.sampler.check()
        guided = self.sampler.guidance != 1
        only_churn, only_guidance = ("churn_min", "churn_max", "churn_noise"), ("guidance_interval",)
        wrong = {
            "--tiles 0: expected at least one; change it": not self.seeds,
            f"--batch-size {self.batch_size}: expected at least 1; change it": self.batch_size < 1,
            "--intensity is about hint images, but there is no --hint; leave it out": self.intensity and not self.hints,
            "--dataset and --channel have no effect with --intensity image; leave one or the other out": (
                self.intensity == "image"
                and (self.dataset, self.channel) != (None, None)
                and self.hints.keys() != {"depth"}  # whose values are no intensities that results could take
            ),
            "--guide has no effect with --guidance 1; give another weight, such as --guidance 2": self.guide
            and not guided,
            "--guide-weights without --guide has no effect; leave it out": self.guide_weights != DEFAULT_WEIGHTS
            and not self.guide,
            "--guidance needs something to be guided by: hints (--hint) or a worse model (--guide)": guided
            and not (self.hints or self.guide),
            "--churn-min, --churn-max and --churn-noise have no effect without --churn; leave them out": not (
                self.sampler.churn or self.sampler.has_defaults(only_churn)
            ),
            "--guidance-interval has no effect with --guidance 1; leave it out": not (
                guided or self.sampler.has_defaults(only_guidance)
            ),
        }
        seed, times = Counter(self.seeds).most_common(1)[0] if self.seeds else (0, 0)
        wrong[f"--seeds: {seed} stands there {times} times, for one and the same tile; name each seed once"] = times > 1
        for name, strength in self.strength.items():
            wrong[f"--strength {name}: there is no --hint {name}; leave it out"] = name not in self.hints
            words = f"--strength {name}={strength:g}: expected a finite number above 0, 1 as trained"
            wrong[f"{words}; without --hint {name} it does not count at all"] = not 0 < strength < math.inf
        for message, is_wrong in wrong.items():
            if is_wrong:
                raise UserError(message)
