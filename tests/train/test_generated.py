"""What the task generators write, to the byte: the bundled demo model was trained on exactly this."""

import dataclasses
import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

from setuptools import Distribution

from train.tasks import GENERATORS, MORE, comp, drills, examples, facts, qa, unrelated, words
from train.tasks.example import Example

ROOT = Path(__file__).parents[2]
COUNT = 150
DIGEST = "75420a0e2d70f6529ad65ac32943b93cc3714eb2c9550bcd7da34d5bddcf5769"


def test_generators_write_what_they_wrote_when_the_demo_model_was_trained() -> None:
    total = hashlib.sha256()
    for text in texts():
        total.update(text.encode() + b"\0")
    assert total.hexdigest() == DIGEST


def test_every_list_is_in_the_wheel(monkeypatch) -> None:
    monkeypatch.chdir(ROOT)
    distribution = Distribution()
    distribution.parse_config_files()
    distribution.include_package_data = False  # what `package-data` names, and not what a checkout happens to hold
    build = distribution.get_command_obj("build_py")
    build.ensure_finalized()
    packed = {Path(folder, name).resolve() for _, folder, _, names in build.data_files for name in names}
    folder = ROOT / "train" / "tasks" / "data"
    wanted = {folder / f"{name}.json" for name in ("words", "events", "conv", "clsfy", "qa", "unrelated", "fields")}
    assert wanted == set(folder.iterdir()) <= packed


def texts() -> Iterator[str]:
    """Some two thousand examples of every kind and split, and the word lists that they are made of."""
    for task in (*GENERATORS, *MORE):
        for split in ("train", "test"):
            yield from map(_written, examples(task, split, seed=7, n=COUNT))
    for key in map(str, range(COUNT)):
        yield _written(drills.example(key))
        yield _written(comp.retold(key))
        yield _written(qa.rival_example("test", key))
        yield _written(qa.conversation("train", key, turns=3, coined=0.5))
        yield _written(facts.conversation(key))
        yield facts.article(key)
    for name in sorted(vars(words)):
        if name.isupper():  # a list
            yield f"{name} {' '.join(getattr(words, name))}"
    yield "\n".join(unrelated.REQUESTS)


def _written(example: Example) -> str:
    return json.dumps(dataclasses.asdict(example))
