"""Running Python programs that nobody trusts, such as a model's answers."""

from openzaya.sandbox.methods import Isolation, isolation
from openzaya.sandbox.records import Limits, Result, Status, Test
from openzaya.sandbox.run import run_python

__all__ = ["Isolation", "Limits", "Result", "Status", "Test", "isolation", "run_python"]
