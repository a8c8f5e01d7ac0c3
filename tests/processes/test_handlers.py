"""Tasks name the functions that handle them in a child process: every name resolves to a function."""

from __future__ import annotations

import inspect
from importlib import import_module

import pytest

from gcbench.processes.messages import handler_of

MODULES = ("job.describe", "measure.task", "predict.task", "plan.task", "check.task")


def tasks():
    """Every class with a handler, in the modules that declare tasks."""
    modules = [import_module(f"gcbench.{name}") for name in MODULES]
    return [
        member
        for module in modules
        for _, member in inspect.getmembers(module, inspect.isclass)
        if member.__module__ == module.__name__ and "handler" in vars(member)
    ]


def test_every_module_of_tasks_declares_one():
    """The trap: a list of tasks that is empty, so that nothing is tested."""
    assert {task.__module__.removeprefix("gcbench.") for task in tasks()} == set(MODULES)


@pytest.mark.parametrize("task", tasks(), ids=lambda task: task.__name__)
def test_the_handler_of_a_task_takes_the_task_and_a_function_for_events(task):
    """The trap: a function that has moved, which only a child process would notice."""
    handler = handler_of(task)
    assert inspect.isfunction(handler)
    assert len(inspect.signature(handler).parameters) == 2
