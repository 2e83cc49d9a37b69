"""`tidegate routing ...`: one file per group of commands (`routing_*.py`); here they get their names."""

import typer

from tidegate import (
    routing_figures,
    routing_learning,
    routing_live,
    routing_scoring,
    routing_sim_equals_live,
    routing_training,
)

app = typer.Typer(
    no_args_is_help=True,
    help="Routing (Tan): which instance answers a request.\n\n"
    "Start with: tidegate routing evaluate --policy deadline,threshold --slots 60000",
)
app.command("evaluate")(routing_scoring.evaluate)
app.command("bench")(routing_scoring.bench)
app.command("limit")(routing_scoring.limit)
app.command("robustness")(routing_scoring.robustness)
app.command("train")(routing_training.train)
app.command("learn")(routing_learning.learn)
app.command("advise")(routing_training.advise)
app.command("use")(routing_live.use)
app.command("shadow")(routing_live.shadow)
app.command("rollback")(routing_live.rollback)
app.command("sim-equals-live")(routing_sim_equals_live.sim_equals_live)
app.add_typer(routing_figures.app, name="figures")
