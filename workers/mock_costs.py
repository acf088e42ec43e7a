"""How long a step of the mock engine takes. Pure arithmetic on counts; no model, no measurement behind the defaults."""

from dataclasses import dataclass, fields

from coordinator.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class MockCosts:
    """`prefill` tokens per second; a step with decodes costs `step_ms` and `seq_ms` for each of them; an import `copy_ms` per page."""

    prefill: float = 20_000.0
    step_ms: float = 8.0
    seq_ms: float = 0.05
    copy_ms: float = 0.02

    @classmethod
    def parse(cls, text: str) -> "MockCosts":
        """From `prefill=20000,step_ms=8`; what is not named keeps its default. Raises ConfigError."""
        given: dict[str, float] = {}
        names = [field.name for field in fields(cls)]
        for part in filter(None, text.split(",")):
            name, _, value = part.partition("=")
            if name not in names:
                raise ConfigError(f"--mock_costs {text}: {name!r:.40} is none of {', '.join(names)}")
            try:
                given[name] = float(value)
            except ValueError:
                raise ConfigError(f"--mock_costs {text}: {name} must be a number, got {value!r:.40}") from None
            if not 0.0 <= given[name] < 1e9 or (name == "prefill" and not given[name]):
                raise ConfigError(f"--mock_costs {text}: {name} must not be negative, and prefill must be above 0")
        return cls(**given)

    def step_s(self, num_prefill_tokens: int, num_decodes: int) -> float:
        decode_ms = self.step_ms + self.seq_ms * num_decodes if num_decodes else 0.0
        return num_prefill_tokens / self.prefill + decode_ms / 1000

    def copy_s(self, num_pages: int) -> float:
        return self.copy_ms * num_pages / 1000
