import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import jax
import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from serve.telemetry.engine_metrics import MAX_TASKS, engine_families
from serve.telemetry.metrics import Histogram, exposition
from tests.serve.conftest import StartServer
from tests.serve.fake import FakeEngine, FakeTokenizer
from tests.serve.resident import needs_proc, resident_bytes
from tests.serve.states import engine_state
from tests.serve.test_server import ask, wait_until

Samples = dict[tuple[str, ...], float]


def parsed(text: str) -> Samples:
    """Values by name and the labels beside `model_name`, `""` without one."""
    values: Samples = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            labels = dict(sample.labels)
            assert labels.pop("model_name", None) == ("fake" if sample.name.startswith("emoe:") else None)
            values[sample.name, *(labels.values() or [""])] = sample.value
    return values


def scrape(client: httpx.Client) -> Samples:
    response = client.get("/metrics")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/plain; version=0.0.4")
    return parsed(response.text)


def test_requests_are_counted_by_answer(start_server: StartServer) -> None:
    with start_server(FakeEngine(FakeTokenizer(), step_seconds=0.02)) as client:
        assert ask(client, prompt=["hi", "you"], n=2, max_tokens=5).status_code == 200
        assert ask(client, stop="c", stream=True).status_code == 200
        assert ask(client, max_tokens=-1).status_code == 400
        values = scrape(client)
    assert values["emoe:prompt_tokens_total", ""] == 3 + 4 + 3
    assert values["emoe:generation_tokens_total", ""] == 4 * 5 + 3
    assert values["emoe:request_success_total", "length"] == 4
    assert values["emoe:request_success_total", "stop"] == 1
    assert values["emoe:time_to_first_token_seconds_count", ""] == 5
    assert values["emoe:inter_token_latency_seconds_count", ""] == 4 * 4 + 2
    assert values["emoe:inter_token_latency_seconds_sum", ""] >= 0.018 * 18
    assert values["emoe:inter_token_latency_seconds_bucket", "+Inf"] == 4 * 4 + 2
    assert values["emoe:request_time_per_output_token_seconds_count", ""] == 5
    assert values["emoe:e2e_request_latency_seconds_sum", ""] >= values["emoe:time_to_first_token_seconds_sum", ""]
    assert values["emoe:e2e_request_latency_seconds_bucket", "+Inf"] == 5
    assert values["emoe:request_queue_time_seconds_count", ""] == 5
    assert values["emoe:request_queue_time_seconds_sum", ""] == 5 * 0.25


def test_what_ends_early_is_counted_as_such(start_server: StartServer) -> None:
    engine = FakeEngine(FakeTokenizer(), step_seconds=0.1)
    with start_server(engine) as client:
        body: dict[str, Any] = {"prompt": "hi", "n": 2, "max_tokens": 90, "stream": True}
        with client.stream("POST", "/v1/completions", json=body) as response:
            next(response.iter_lines())
        wait_until(lambda: not engine.running)
        engine.failures = [RuntimeError()]
        assert ask(client).status_code == 500
        values = scrape(client)
    assert values["emoe:request_success_total", "abort"] == 2
    assert values["emoe:request_success_total", "error"] == 1


def test_the_engine_s_state_is_scraped(start_server: StartServer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeEngine, "state", lambda _: engine_state())
    with start_server(FakeEngine(FakeTokenizer())) as client:
        values = scrape(client)
    expected = {
        ("emoe:num_requests_running", ""): 1,
        ("emoe:num_requests_waiting", ""): 2,
        ("emoe:kv_cache_usage_perc", ""): 0.25,
        ("emoe:num_preemptions_total", ""): 4,
        ("emoe:prefix_cache_queries_total", ""): 90,
        ("emoe:prefix_cache_hits_total", ""): 32,
        ("emoe:expert_coverage", ""): 0.85,
        ("emoe:experts_resident", "1"): 2,
        ("emoe:expert_wishes_total", "3"): 10,
        ("emoe:expert_wishes_resident_total", ""): 17,
        ("emoe:expert_loads_total", ""): 6,
        ("emoe:expert_wait_loads_total", ""): 5,
        ("emoe:expert_wait_seconds_total", ""): 0.25,
        ("emoe:forwards_total", "again"): 3,
        ("emoe:expert_loads_useless_total", ""): 1,
        ("emoe:link_bandwidth_bytes_per_second", ""): 70000,
        ("emoe:predictor_open", ""): 1,
        ("emoe:predict_every", ""): 40,
        ("emoe:predictions_total", ""): 2,
        ("emoe:prediction_invocations_total", ""): 2,
        ("emoe:planner_coverage", "recent"): 0.87,
        ("emoe:memory_bytes", "workspace"): 50,
        ("emoe:memory_lean", ""): 1,
        ("emoe:memory_trades_total", ""): 3,
        ("emoe:planning_seconds_total", ""): 0.02,
        ("emoe:regret_steps_total", ""): 256,
        ("emoe:regret_steps_left_out_total", ""): 12,
        ("emoe:regret_seconds_total", ""): 0.004,
        ("emoe:regret_wishes_total", ""): 1000,
        ("emoe:regret_lookups_total", ""): 500,
        ("emoe:policy_wishes_resident_total", "engine"): 850,
        ("emoe:policy_wishes_resident_total", "belady"): 925,
        ("emoe:policy_lookups_resident_total", "lru"): 300,
        ("emoe:policy_loads_total", "lru"): 640,
        ("emoe:engine_step_seconds_total", ""): 0.5,
        ("emoe:task_substituted_ratio", "qa"): 0.1,
        ("emoe:task_substituted_weight", "sum"): 0.05,
        ("emoe:audits_total", ""): 12,
        ("emoe:audits_given_up_total", ""): 1,
        ("emoe:audits_waiting", ""): 2,
        ("emoe:audit_seconds_total", ""): 0.75,
        ("emoe:audit_kl", "bounded", "high", "qa"): 0.006,
        ("emoe:audit_top1_agreement", "bounded", "mean", "qa"): 0.97,
        ("emoe:audit_perplexity_ratio", "resident", "low", "sum"): 1.0,
        ("emoe:tolerance", "qa"): 0.21,
        ("emoe:slo_answers_total", ""): 2,
        ("emoe:slo_given_up_total", ""): 1,
        ("emoe:task_slo_attained_total", "qa"): 1,
    }
    assert {key: values[key] for key in expected} == expected
    assert ("emoe:planner_coverage", "promised") not in values
    assert ("emoe:audit_perplexity_ratio", "resident", "high", "sum") not in values


@needs_proc
def test_the_process_is_measured(client: httpx.Client) -> None:
    before = scrape(client)
    assert before["process_resident_memory_bytes", ""] == pytest.approx(resident_bytes(), rel=0.1)
    assert before["process_cpu_seconds_total", ""] > 0
    compilations = "emoe:compilations_total", ""
    assert scrape(client)[compilations] == before[compilations]
    new = float(time.time_ns() % 2**20)  # so that it is in no cache
    jax.jit(lambda x: x * new)(np.ones(7, np.float32))
    compiled = scrape(client)[compilations]
    assert compiled > before[compilations]
    jax.clear_caches()
    jax.jit(lambda x: x * new)(np.ones(7, np.float32))  # read from JAX's cache: nothing is compiled
    assert scrape(client)[compilations] == compiled


def test_tasks_that_clients_make_up_are_bounded_and_escaped() -> None:
    tasks = {f'a "task"\n{number}': {"requests": number} for number in range(1000)}
    tasks = {name: {**task, "substituted": 0.0, "substituted_weight": 0.0} for name, task in tasks.items()}
    values = parsed(exposition(engine_families({"tasks": tasks}, "fake")).decode())
    shown = [label for name, label in values if name == "emoe:task_requests_total"]
    assert len(shown) == MAX_TASKS
    assert 'a "task"\n999' in shown


def test_apps_do_not_share_metrics_and_need_no_key_for_them(start_server: StartServer) -> None:
    with start_server(FakeEngine(FakeTokenizer()), api_keys=["secret"]) as client:
        assert ask(client).status_code == 401
        assert scrape(client)["emoe:generation_tokens_total", ""] == 0


def test_a_dead_engine_leaves_the_requests_metrics(start_server: StartServer) -> None:
    engine = FakeEngine(FakeTokenizer())
    with start_server(engine) as client:
        engine.failures = [SystemExit()]  # pyright: ignore[reportAttributeAccessIssue]
        assert ask(client).status_code == 500
        wait_until(lambda: client.get("/health").status_code == 503)
        assert scrape(client)["emoe:request_success_total", "error"] == 1


def test_scrapes_while_many_requests_run(start_server: StartServer) -> None:
    with start_server(FakeEngine(FakeTokenizer())) as client, ThreadPoolExecutor(8) as pool:
        answers = [pool.submit(ask, client, max_tokens=50) for _ in range(32)]
        while not all(answer.done() for answer in answers):
            scrape(client)
        assert scrape(client)["emoe:generation_tokens_total", ""] == 32 * 50


def test_histograms_count_up_to_and_with_each_bound() -> None:
    histogram = Histogram("emoe:x", "x", (0.5, 1.0))
    for value in (0.5, 0.75, 1.0, 2.0):
        histogram.observe(value)
    assert parsed(exposition([histogram.family("fake")]).decode()) == {
        ("emoe:x_bucket", "0.5"): 1,
        ("emoe:x_bucket", "1.0"): 3,
        ("emoe:x_bucket", "+Inf"): 4,
        ("emoe:x_count", ""): 4,
        ("emoe:x_sum", ""): 4.25,
    }
