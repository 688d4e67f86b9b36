"""What a diagnosis consists of: measured values, and sentences about what is wrong."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Findings:
    """Values to show, `faults` that keep a run from working, and `warnings` about what will hurt it."""

    values: dict[str, str] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    def told(self) -> str:
        """All of it, in aligned lines."""
        width = max((len(name) for name in self.values), default=0)
        lines = [f"  {name:<{width}}  {value}" for name, value in self.values.items()]
        lines += [f"  warning: {warning}" for warning in self.warnings]
        lines += [f"  fault: {fault}" for fault in self.faults]
        return "\n".join(lines)
