"""A parser's tree of reasons, a library's error and a near miss, each as one line."""

import errno

import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from srpo_lightning.errors import explain, naming, one_line
from srpo_lightning.suggestions import nearest, nearest_setting

SETTINGS = {"trainer.max_steps", "trainer.max_time", "model.objective", "data.train", "checkpoint.monitor"}
UNION = """Parser key "trainer.callbacks":

  - Expected a path but x either not accessible or invalid
  - Does not validate against any of the Union subtypes
  Subtypes: [list[lightning.Callback], <class 'NoneType'>]
  Errors:
    - Problem with given class_path 'srpo_lightning.callbacks.EMA':
        Parser key "decay":
          Not of type ClosedUnitInterval: 7 does not conform to restriction v>=0 and v<=1
    - Problem with given class_path 'lightning.Callback':
        Option 'decay' is not accepted
    - Expected a <class 'NoneType'>
  Given value type: <class 'dict'>
  Given value: {'decay': 7}"""


@pytest.mark.parametrize(
    ("message", "line"),
    [
        (UNION, "trainer.callbacks.init_args.decay: expected a number from 0 to 1, found 7"),
        (
            "unrecognized arguments: --trainer.max_stepps 3",
            "trainer.max_stepps: there is no such setting; did you mean trainer.max_steps?",
        ),
        (
            "Subcommand 'fit' does not accept option 'modell.objective'",
            "modell.objective: there is no such setting; did you mean model.objective?",
        ),
        (
            "Parser key \"model.objective\":\n  Problem with given class_path 'srpo_lightning.objectives.SRPO':\n"
            "    Option 'marginn' is not accepted",
            "model.objective.init_args.marginn: there is no such setting; did you mean margin?",
        ),
        (
            'Parser key "model.objective":\n\n  - Expected a path but SRP0 either not accessible or invalid\n'
            "  - Expected a dot import path string: SRP0",
            "model.objective is SRP0: there is no such class; did you mean srpo_lightning.objectives.SRPO?",
        ),
        (
            "Parser key \"checkpoint.mode\":\n  Expected a typing.Literal['max', 'min']. Got value: up",
            "checkpoint.mode: expected max or min, found up",
        ),
        (
            'Parser key "model.optimizer":\n  Type typing.Callable[[x], y] expects a function or a callable class: '
            "Parser key \"lr\":\n\n    Expected a <class 'float'>. Got value: fast. Got value: "
            "Namespace(class_path='torch.optim.AdamW', init_args=Namespace(lr='fast'))",
            "model.optimizer.init_args.lr: expected a number, found fast",
        ),
        (
            "the following arguments are required: fit.model.policy, fit.data.train",
            "these settings are missing: model.policy, data.train (give them, or --config FILE)",
        ),
        ("something else\n  in two lines", "something else in two lines"),
    ],
    ids=range(9),
)
def test_a_parsers_reasons_become_one_line_that_names_the_setting(message, line):
    assert explain(message, SETTINGS) == line


def test_names_are_near_by_any_of_their_parts_and_unlike_names_are_not():
    assert nearest_setting("traner.max_steps", SETTINGS) == "; did you mean trainer.max_steps?"
    assert nearest_setting("max_steps", SETTINGS) == "; did you mean trainer.max_steps?"
    assert nearest_setting("dta.colour", SETTINGS) == nearest_setting("colour", SETTINGS) == ""
    assert nearest("clipreward", ["srpo_lightning.rewards.ClipReward"]).endswith("rewards.ClipReward?")
    assert nearest("xyz", ["srpo_lightning.rewards.ClipReward"]) == ""


class Picky:
    def __init__(self, size):
        self.size = int(size)  # as a library would: an error that is not ours


def test_what_a_class_refuses_is_told_by_its_name_and_our_own_words_stay():
    with pytest.raises(ValueError, match=r"^Picky: invalid literal .*SRPO_TRACEBACK=1 shows where"), naming():
        Picky("a")
    with pytest.raises(ValueError, match=r"^model.optimizer: no\n?"), naming("model.optimizer"):
        raise TypeError("no\nway")


def test_a_librarys_refusal_and_a_files_are_one_line_and_other_errors_keep_their_traceback():
    assert one_line(raised(MisconfigurationException("a\n  b"))) == "a b (SRPO_TRACEBACK=1 shows where)"
    locked = raised(OSError(errno.EROFS, "Read-only file system", "/run/x.ckpt"))
    assert one_line(locked) == "/run/x.ckpt: Read-only file system (SRPO_TRACEBACK=1 shows where)"
    assert one_line(raised(torch.OutOfMemoryError("out of memory. Tried"))).startswith("out of memory: `estimate`")
    assert one_line(raised(RuntimeError("a kernel"))) is None
    assert one_line(raised(ValueError("of a library"))) is None


def raised(error: BaseException) -> BaseException:
    try:
        raise error
    except BaseException as caught:
        return caught
