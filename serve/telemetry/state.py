"""What `/v1/emoe/state` and `/v1/emoe/replicas` say, for their documentation. There may be more than is described."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Described(BaseModel):
    """Everything may be missing: a model without predictor has none of its numbers."""

    model_config = ConfigDict(extra="allow")


class LoadsState(Described):
    """Totals since the start."""

    loads: Annotated[int, Field(description="Experts brought to the device.")] = 0
    loaded_bytes: int = 0
    bandwidth: Annotated[float | None, Field(description="Measured while staging, bytes/s.")] = None
    link_bandwidth: Annotated[float | None, Field(description="What loads may take, bytes/s; null is no limit.")] = None
    in_flight: Annotated[int, Field(description="Asked for and not there yet.")] = 0
    useful: Annotated[int, Field(description="Loaded in the background and then wished for.")] = 0
    useless: Annotated[int, Field(description="Loaded in the background and replaced unwished for.")] = 0
    layers_spared: Annotated[int, Field(description="Exchanges not made: no request is sensitive there.")] = 0
    cancelled: Annotated[int, Field(description="Given up, because a newer plan no longer wanted them.")] = 0
    failures: Annotated[int, Field(description="Experts that could not be read, after all retries.")] = 0
    retries: int = 0
    last_error: str | None = None
    waited_loads: Annotated[int, Field(description="Those that a step waited for.")] = 0
    wait_seconds: Annotated[float, Field(description="How long steps waited for them.")] = 0.0


class AheadState(Described):
    """Experts, counted once per step and layer, that `exact` steps ask for before their layer is reached."""

    misses: Annotated[int, Field(description="Wished for and absent when the layer was reached.")] = 0
    asked: Annotated[int, Field(description="Asked for ahead.")] = 0
    spared: Annotated[int, Field(description="Misses that had been staged by then.")] = 0
    late: Annotated[int, Field(description="Misses that had been asked for, and were still on their way.")] = 0
    useless: Annotated[int, Field(description="Moved, and not wished for.")] = 0
    withdrawn: Annotated[int, Field(description="Not wished for, and given up before they were moved.")] = 0


class ResidencyState(Described):
    """Lists have an item per MoE layer, in the order of `moe_layers`."""

    policy: str = ""
    num_experts: Annotated[int, Field(description="Per MoE layer.")] = 0
    top_k: int = 0
    moe_layers: Annotated[list[int], Field(description="Which layers of the model these are.")] = []
    slots: Annotated[list[int], Field(description="Experts that each layer has room for.")] = []
    share: Annotated[float, Field(description="Slots over all experts.")] = 0.0
    experts: Annotated[list[list[int]], Field(description="Those on the device.")] = []
    loading: Annotated[list[tuple[int, int]], Field(description="Pairs of item and expert on their way in.")] = []
    wishes: Annotated[list[list[int]], Field(description="How often routers chose each expert, since the start.")] = []
    coverage: Annotated[float | None, Field(description="Share of the wishes that were resident at the time.")] = None
    loads: LoadsState = LoadsState()
    ahead: Annotated[AheadState | None, Field(description="Null but under the policy pre-gated.")] = None


class PlannerState(Described):
    """Coverages are shares of wishes, null before anything is known of them."""

    planning_seconds: Annotated[float, Field(description="Planning and following wishes, within steps.")] = 0.0
    predictor: Annotated[bool, Field(description="Whether there is one.")] = False
    open: Annotated[bool, Field(description="Whether it counts; false while decayed frequency covers more.")] = False
    predict_every: Annotated[int, Field(description="Prompts that share a prediction at present.")] = 0
    predict_every_auto: Annotated[bool, Field(description="Whether that follows measured cost and gain.")] = False
    prompts_since: Annotated[int, Field(description="Prompts that share the newest prediction so far.")] = 0
    predictions: Annotated[int, Field(description="Prompts that were predicted because it was their turn.")] = 0
    early_predictions: Annotated[int, Field(description="Prompts predicted besides, because coverage fell.")] = 0
    invocations: Annotated[int, Field(description="Calls of the predictor, each for one prompt or more.")] = 0
    missed: Annotated[int, Field(description="Prompts not asked about, for too many questions waited.")] = 0
    insensitive: Annotated[int, Field(description="Prompts not asked about: no layer is sensitive.")] = 0
    seconds: Annotated[float, Field(description="Of the predictor's thread.")] = 0.0
    seconds_per_prediction: Annotated[float | None, Field(description="Of the thread, without learning.")] = None
    computing_seconds_per_prompt: Annotated[float | None, Field(description="Of the device, answer included.")] = None
    gain: Annotated[float | None, Field(description="Coverage of own predictions less that of frequency.")] = None
    coverage_predicted: Annotated[float | None, Field(description="Of the last prompts, by prediction.")] = None
    coverage_frequency: Annotated[float | None, Field(description="The same by decayed frequency.")] = None
    coverage_promised: Annotated[float | None, Field(description="What the plan at hand expects.")] = None
    coverage_recent: Annotated[float | None, Field(description="Of recent steps.")] = None
    serves: Annotated[
        dict[str, float], Field(description="By task: share of its wishes that the residents are expected to cover.")
    ] = {}
    error: Annotated[str | None, Field(description="What ended the predictor.")] = None


class RivalState(Described):
    """Totals over judged steps; the shares are null before the first."""

    wishes: Annotated[int, Field(description="Choices of tokens whose expert was, or would have been, resident.")] = 0
    coverage: Annotated[float | None, Field(description="Their share.")] = None
    lookups: Annotated[int, Field(description="The same, counted once per step, layer and expert.")] = 0
    hit_rate: Annotated[float | None, Field(description="Their share.")] = None
    loads: Annotated[int, Field(description="Experts brought to the device.")] = 0


class RegretState(Described):
    """What other policies would have covered of the same traffic with as many slots. `belady` knows the future."""

    steps: Annotated[int, Field(description="Those judged, in whole windows.")] = 0
    steps_left_out: Annotated[int, Field(description="For lack of time.")] = 0
    window_steps: Annotated[int, Field(description="Steps of a window, all the future that `belady` knows.")] = 0
    seconds: Annotated[float, Field(description="Recording and judging, within steps.")] = 0.0
    wishes: Annotated[int, Field(description="Of the judged steps: choices of tokens.")] = 0
    lookups: Annotated[int, Field(description="The same, counted once per step, layer and expert.")] = 0
    policies: Annotated[dict[str, RivalState], Field(description="By name; `engine` is what was resident.")] = {}


class DeadlinesState(Described):
    """Counts of answers since the start."""

    ended: int = 0
    with_slo: Annotated[int, Field(description="Those that had a deadline.")] = 0
    attained: Annotated[int, Field(description="Those that kept all of theirs.")] = 0
    attainment: Annotated[float | None, Field(description="Their share.")] = None


class AllDeadlinesState(DeadlinesState):
    """Of all answers, and by task in `tasks`."""

    tasks: dict[str, DeadlinesState] = {}


class SchedulerState(Described):
    """Sequences and pages at present; preemptions and prefix tokens are totals since the start."""

    policy: str = ""
    waiting: int = 0
    running: int = 0
    preemptions: Annotated[int, Field(description="Sequences whose pages were taken away, since the start.")] = 0
    pages_used: Annotated[int, Field(description="Of the KV cache.")] = 0
    pages: int = 0
    prefix_caching: Annotated[bool, Field(description="Whether tokens computed before are looked up.")] = False
    prefix_query_tokens: Annotated[int, Field(description="Looked up, since the start.")] = 0
    prefix_hit_tokens: Annotated[int, Field(description="Those that were not computed again.")] = 0
    slo: AllDeadlinesState = AllDeadlinesState()


class TaskState(Described):
    """Of the ended requests of one task."""

    requests: int = 0
    substituted: Annotated[float, Field(description="Share of expert choices for which another stood in.")] = 0.0
    substituted_weight: Annotated[float, Field(description="The same by router probability.")] = 0.0


class MemoryTradeState(Described):
    """Slab and KV cache may trade places within the memory plan. Counts since the start."""

    possible: Annotated[bool, Field(description="Whether the plan has a lean slab beside the planned one.")] = False
    lean: Annotated[bool, Field(description="Whether the slab is lean now, to the good of the KV cache.")] = False
    trades: Annotated[int, Field(description="Both ways.")] = 0
    trade_seconds: Annotated[float, Field(description="Time that trades took.")] = 0.0
    error: Annotated[str | None, Field(description="Why there are no more trades.")] = None


class ForwardsState(Described):
    """How batches were computed whose rows may need absent experts. Counts since the start."""

    whole: Annotated[int, Field(description="In one call, as if nothing were missing.")] = 0
    again: Annotated[int, Field(description="Once more, or from a router on, after missing experts were loaded.")] = 0
    layered: Annotated[int, Field(description="With a stop at every router.")] = 0


Interval = Annotated[
    list[float | None], Field(description="Mean per token, low and high end of its 95 % interval; null is none.")
]


class FoundState(Described):
    """What audits found of the newest answers of a task under one contract."""

    audits: Annotated[int, Field(description="Since the start.")] = 0
    tolerance: Annotated[float | None, Field(description="Of the newest; null where the contract has none.")] = None
    tokens: Annotated[int, Field(description="Of the newest answers under it, which the estimates are of.")] = 0
    kl: Interval = []
    top1_agreement: Interval = []
    perplexity_ratio: Interval = []


class TunedState(Described):
    """The tolerance of a task that a quality target led to."""

    tolerance: float = 0.0
    settled: Annotated[bool, Field(description="Whether the next larger one is known to lose too much.")] = False


class TargetState(Described):
    """Targets are expected perplexities over those of all experts, less 1."""

    usual: float = 0.0
    of_tasks: dict[str, float] = {}
    tasks: dict[str, TunedState] = {}


class AuditState(Described):
    """Answers computed once more under all experts, to tell what their contract cost. Counts since the start."""

    rate: Annotated[float, Field(description="Share of the answers that are audited.")] = 0.0
    audits: int = 0
    given_up: Annotated[int, Field(description="For want of time, pages, or because they failed.")] = 0
    waiting: int = 0
    seconds: Annotated[float, Field(description="What audits took of the engine's time.")] = 0.0
    contracts: Annotated[dict[str, dict[str, FoundState]], Field(description="By contract and task.")] = {}
    target: Annotated[TargetState | None, Field(description="Null where tolerances stay what they are.")] = None


class EngineState(Described):
    """The engine between two steps. Times are in seconds, sizes in bytes, shares from 0 to 1."""

    model: str = ""
    family: str = ""
    routing: str = ""
    tolerance: Annotated[
        float, Field(description="Under `bounded`, of requests that name none; a target of `audit` goes before it.")
    ] = 0.0
    audit: AuditState = AuditState()
    forwards: ForwardsState = ForwardsState()
    steps: int = 0
    step_seconds: Annotated[float, Field(description="Time spent in them.")] = 0.0
    not_finite: Annotated[int, Field(description="Answers ended because the model computed NaN or infinity.")] = 0
    residency: ResidencyState = ResidencyState()
    planner: PlannerState = PlannerState()
    regret: RegretState = RegretState()
    tasks: Annotated[dict[str, TaskState], Field(description="What ended requests lost, by task.")] = {}
    scheduler: SchedulerState = SchedulerState()
    memory: Annotated[dict[str, int], Field(description="Bytes by purpose, all within `device`.")] = {}
    memory_trade: MemoryTradeState = MemoryTradeState()


class ReplicaState(Described):
    """One replica. All but the name and the unfinished requests is as it published it last; before that, it is null."""

    name: Annotated[str, Field(description="As of the header x-emoe-replica.")]
    unfinished: Annotated[int, Field(description="Requests that it was given and has not answered.")] = 0
    serves: Annotated[
        dict[str, float], Field(description="By task: share of its wishes that the residents are expected to cover.")
    ] = {}
    coverage: Annotated[float | None, Field(description="Share of the wishes of recent steps that were resident.")] = (
        None
    )
    resident_share: Annotated[float | None, Field(description="Slots over all experts.")] = None
    running: Annotated[int | None, Field(description="Sequences at present.")] = None
    waiting: Annotated[int | None, Field(description="Sequences at present.")] = None
    answers: Annotated[int | None, Field(description="Answers that have ended, since its start.")] = None


class FleetState(Described):
    """The replicas under Ray Serve, by their names."""

    replicas: list[ReplicaState] = []
