"""The command line of `python -m train.predictor`."""

from __future__ import annotations

import argparse
from pathlib import Path

from emoe_jax.predictor.config import ARCHITECTURES, VARIANTS, PredictorConfig
from train.predictor.trainer import Hyperparameters
from train.ranges import CommandParser, check_ranges

STEPS = 300


def arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = CommandParser(
        prog="python -m train.predictor",
        description="Train the expert predictor on a routing trace, or judge a trained one on a trace.",
    )
    parser.add_argument("--traces", type=Path, required=True, help="routing trace (.npz)")
    does = parser.add_mutually_exclusive_group(required=True)
    does.add_argument("--out", type=Path, help="train; a killed run with the same options resumes from here")
    does.add_argument("--evaluate", type=Path, metavar="DIR", help="judge the predictor in DIR, train nothing")
    parser.add_argument("--json", type=Path, help="write the numbers here")
    parser.add_argument(
        "--plots",
        action=argparse.BooleanOptionalAction,
        help="draw curves.png into --out; needs matplotlib (default: where that is installed)",
    )
    parser.add_argument("--variant", choices=VARIANTS, default=PredictorConfig.variant)
    parser.add_argument("--arch", choices=ARCHITECTURES, default=PredictorConfig.arch)
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, help=f"optimizer steps ({STEPS})")
    length.add_argument("--epochs", type=int, help="the same in passes over the training prompts")
    parser.add_argument("--seed", type=int, default=0, help="of weights, batches and the held-out prompts")
    parser.add_argument(
        "--first-tokens", type=int, default=PredictorConfig.first_tokens, help="early answer tokens used"
    )
    parser.add_argument(
        "--token-runs",
        type=int,
        default=PredictorConfig.token_runs,
        help="runs of one, two and three prompt tokens whose routing is kept, so many of each at most",
    )
    parser.add_argument("--width", type=int, default=PredictorConfig.width, help="of the networks")
    parser.add_argument("--members", type=int, default=PredictorConfig.members, help="networks averaged")
    parser.add_argument("--rate", type=float, default=Hyperparameters.peak_rate, help="peak learning rate")
    parser.add_argument(
        "--held-out", type=float, default=Hyperparameters.held_out, help="share of prompts to choose the best by"
    )
    parser.add_argument("--shuffle-labels", action="store_true", help="control: deal routing to other prompts")
    parser.add_argument("--no-updates", action="store_true", help="evaluate without learning from the trace's prompts")
    options = parser.parse_args(argv)
    ranges = {
        "steps": (1, 10**7),
        "epochs": (1, 10**6),
        "seed": (0, 2**31 - 1),
        "first_tokens": (1, 10**4),
        "token_runs": (1, 10**7),
        "width": (4, 4096),
        "members": (1, 64),
    }
    check_ranges(parser, options, ranges)
    if options.width % PredictorConfig.heads:
        parser.error(f"--width is {options.width}; it must be a multiple of {PredictorConfig.heads}")
    if not 0 < options.rate < 1e6:
        parser.error(f"--rate is {options.rate}; it must be above 0")
    if not 0.02 <= options.held_out <= 0.5:
        parser.error(f"--held-out is {options.held_out}; it must be between 0.02 and 0.5")
    return options


def steps(options: argparse.Namespace, num_prompts: int) -> int:
    """Optimizer steps, of which one sees `Hyperparameters.rows` prompts."""
    if options.epochs is None:
        return options.steps or STEPS
    return options.epochs * -(-num_prompts // Hyperparameters.rows)
