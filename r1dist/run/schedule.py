"""Which generation belongs to which optimizer step."""

from dataclasses import dataclass


@dataclass(frozen=True)
class GenerationSchedule:
    """Counts micro-steps, generations and optimizer steps from the run's beginning.

    A generation is trained on for `steps_per_generation` x `num_iterations` micro-steps, an optimizer step takes
    `gradient_accumulation_steps` of them; one number divides the other. An epoch's last step may be shorter.
    """

    accumulation: int
    """`gradient_accumulation_steps`"""
    micro_steps: int
    """Of a generation, all iterations included."""
    per_epoch: int
    """Generations of an epoch."""

    @property
    def spans_steps(self) -> bool:
        """Whether a generation lasts for one or more whole optimizer steps, rather than being one of several."""
        return self.micro_steps % self.accumulation == 0

    def step_of(self, generation: int) -> int:
        """The optimizer step that the generation is made for."""
        if self.spans_steps:
            return generation * (self.micro_steps // self.accumulation)
        epoch, place = divmod(generation, self.per_epoch)
        each = self.accumulation // self.micro_steps
        return epoch * -(-self.per_epoch // each) + place // each

    def micro_step_at(self, step: int) -> int:
        """Micro-steps before optimizer step `step`."""
        if self.spans_steps:
            return step * self.accumulation
        each = self.accumulation // self.micro_steps
        epoch, place = divmod(step, -(-self.per_epoch // each))
        return (epoch * self.per_epoch + place * each) * self.micro_steps

    def generations_of(self, step: int) -> range:
        """The generations that are made for optimizer step `step`: none, one, or several."""
        first = -(-self.micro_step_at(step) // self.micro_steps)
        return range(first, -(-self.micro_step_at(step + 1) // self.micro_steps))
