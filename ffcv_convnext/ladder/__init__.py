"""The ladder rn_configs/: its steps, their runs as jobs, and the state of those runs."""

from ffcv_convnext.ladder.jobs import (
    budget,
    check_overrides,
    parse_seeds,
    plan_ladder,
    submit_ladder,
    with_gpus_per_job,
)
from ffcv_convnext.ladder.plan import Budget, find_recipes, format_plan, make_offers, rates_of, spread_of
from ffcv_convnext.ladder.status import RunStatus, cancel_runs, format_status, read_log, read_status, watch
from ffcv_convnext.ladder.steps import (
    STARTING_POINT,
    PaperResult,
    Step,
    describe,
    format_table,
    natural_order,
    read_ladder,
    read_paper,
    read_released,
    read_step,
    select_steps,
    size_of,
)

__all__ = [
    "STARTING_POINT",
    "Budget",
    "PaperResult",
    "RunStatus",
    "Step",
    "budget",
    "cancel_runs",
    "check_overrides",
    "describe",
    "find_recipes",
    "format_plan",
    "format_status",
    "format_table",
    "make_offers",
    "natural_order",
    "parse_seeds",
    "plan_ladder",
    "rates_of",
    "read_ladder",
    "read_log",
    "read_paper",
    "read_released",
    "read_status",
    "read_step",
    "select_steps",
    "size_of",
    "spread_of",
    "submit_ladder",
    "watch",
    "with_gpus_per_job",
]
