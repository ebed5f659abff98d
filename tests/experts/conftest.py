from collections.abc import Callable, Iterator

import pytest

from tests.experts.rig import Rig


@pytest.fixture
def rig() -> Iterator[Callable[..., Rig]]:
    rigs = []

    def make(capacities: list[int], **options) -> Rig:
        rigs.append(Rig(capacities, **options))
        return rigs[-1]

    yield make
    for each in rigs:
        each.reader.gate.set()
        each.loader.close()
