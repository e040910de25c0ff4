"""The embedded default: made-up skills, a small model trained on all of them, the real pipeline."""

from gradsift.demo.show import run_demo

__all__ = ["run_demo"]
