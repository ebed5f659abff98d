import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from emoe_jax.amounts import format_bytes, format_number, parse_expert_memory
from emoe_jax.config import ModelConfig
from emoe_jax.errors import CapacityError, ConfigError
from emoe_jax.experts.record_format import RecordFormat
from emoe_jax.memory.budget import capacities

CONFIG = ModelConfig(
    family="mixtral",
    vocab_size=8,
    hidden_size=64,
    num_layers=4,
    num_heads=2,
    num_kv_heads=2,
    head_dim=32,
    max_position=64,
    num_experts=16,
    top_k=2,
    expert_hidden=128,
    moe_layers=(0, 1, 2, 3),
)
RECORD_FORMAT = RecordFormat.of(CONFIG, "float32")  # 96 KiB per expert, 384 KiB for one slot in every layer


@pytest.mark.parametrize(
    ("text", "slots"),
    [
        ("40%", [7, 6, 6, 6]),  # 25.6 of 64
        ("37.5 %", [6] * 4),
        ("29%", [5, 5, 4, 4]),
        ("25%", [4] * 4),
        ("100%", [16] * 4),
        ("8 slots", [8] * 4),
        ("8", [8] * 4),
        (" 2 Slots ", [2] * 4),
        ("16 slots", [16] * 4),
        ("1MiB", [3, 3, 2, 2]),
        ("1.5MiB", [4] * 4),
        ("4 mib", [11, 11, 10, 10]),
        ("1gb", [16] * 4),
        ("1000KB", [3, 3, 2, 2]),
        ("1572864B", [4] * 4),
    ],
)
def test_budgets_are_spent_to_the_last_slot(text: str, slots: list[int]):
    assert capacities(CONFIG, RECORD_FORMAT, parse_expert_memory(text)) == slots


@pytest.mark.parametrize(
    "text", ["", "x", "-4", "-10%", "140%", "1.5 slots", "6 GiBs", "GiB", "1e3", "nan", "40%%", "٤", "9" * 5000]
)
def test_what_is_no_budget_is_refused(text: str):
    with pytest.raises(ConfigError, match="expert memory"):
        parse_expert_memory(text)


@pytest.mark.parametrize(
    ("text", "hint"),
    [("99 slots", ""), ("17", "; a number without a unit is slots: say 17% or 17MB for a share or bytes")],
)
def test_more_slots_than_experts_are_refused(text: str, hint: str):
    with pytest.raises(ConfigError, match=rf"slots is more than all experts; a layer has 16{hint}$"):
        capacities(CONFIG, RECORD_FORMAT, parse_expert_memory(text))


@pytest.mark.parametrize(
    ("text", "smallest"),
    [("12%", "12.5%"), ("0%", "12.5%"), ("1", "2 slots"), ("700KiB", "768KiB"), ("0GiB", "768KiB")],
)
def test_below_top_k_both_numbers_and_the_smallest_budget_are_named(text: str, smallest: str):
    with pytest.raises(CapacityError, match=f"routes each token to 2; the smallest budget is {smallest}$"):
        capacities(CONFIG, RECORD_FORMAT, parse_expert_memory(text))
    assert capacities(CONFIG, RECORD_FORMAT, parse_expert_memory(smallest)) == [2] * 4


def test_larger_than_the_device_is_refused_with_both_numbers():
    with pytest.raises(CapacityError, match="6 GiB is more than the 4 MiB"):
        capacities(CONFIG, RECORD_FORMAT, parse_expert_memory("6GiB"), device_limit=4 << 20)
    with pytest.raises(CapacityError, match=r"100% is 6 MiB \(16 expert slots in each of 4 layers\), more"):
        capacities(CONFIG, RECORD_FORMAT, parse_expert_memory("100%"), device_limit=4 << 20)
    assert capacities(CONFIG, RECORD_FORMAT, parse_expert_memory("50%"), device_limit=4 << 20) == [8] * 4


@settings(max_examples=200, deadline=None)
@given(
    num_experts=st.integers(1, 300),
    data=st.data(),
    kind=st.sampled_from(["%", "MiB", "slots"]),
    hidden=st.sampled_from([8, 64, 4096]),
)
def test_the_smallest_budget_named_is_one_that_works(num_experts: int, data: st.DataObject, kind: str, hidden: int):
    top_k = data.draw(st.integers(1, num_experts))
    config = CONFIG.replace(num_experts=num_experts, top_k=top_k, hidden_size=hidden)
    record_format = RecordFormat.of(config, "bfloat16")
    with pytest.raises(CapacityError) as caught:
        capacities(config, record_format, parse_expert_memory(f"0{kind}"))
    smallest = parse_expert_memory(str(caught.value).rsplit("is ", 1)[1])
    slots = capacities(config, record_format, smallest)
    assert all(top_k <= count <= num_experts for count in slots)
    limit = (
        capacities(config, record_format, parse_expert_memory("100%"), sum(slots) * record_format.nbytes)
        if min(slots) == num_experts
        else None
    )
    assert limit in (None, slots)


def test_format_bytes():
    assert [format_bytes(count) for count in (0, 1023, 1536, 6 << 30, 5 << 40)] == [
        "0 bytes",
        "1023 bytes",
        "1.5 KiB",
        "6 GiB",
        "5 TiB",
    ]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.5, "0.5"), (12.0, "12"), (999.94, "999.9"), (1234.56, "1,235"), (123456.7, "123,500"),
        (1234567, "1,234,567"), (0.0, "0"),
    ],
)  # fmt: skip
def test_numbers_have_four_digits_and_commas(value: float, expected: str) -> None:
    assert format_number(value) == expected
