"""Writes the report of a comparison: one self-contained HTML file, with the verdict first."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from tokenrl.lab.compare.comparison import Comparison
from tokenrl.lab.compare.records import Plan, Problem
from tokenrl.lab.compare.report.by_arm import arms_table, gates_table, noise, thresholds
from tokenrl.lab.compare.report.curves import learning_curves, performance_profiles, sensitivity
from tokenrl.lab.compare.report.forest import forest
from tokenrl.lab.compare.report.raw import completions, differences_table, runs_table
from tokenrl.lab.compare.scores import SCORES
from tokenrl.lab.compare.shown import span
from tokenrl.lab.compare.statistics.found import Family
from tokenrl.lab.compare.statistics.words import headline, sentence, shown
from tokenrl.lab.compare.tables import CITATION
from tokenrl.runs.console import duration
from tokenrl.runs.page import Html, preformatted, section, table, tag, write_page
from tokenrl.runs.resume import processor

FROM_PYTHON = "Started from Python: the same call of tokenrl.compare goes on with it, or shows it again."


def write_report(found: Comparison, path: Path) -> Path:
    """Write the report of a comparison.

    Args:
        found: the comparison.
        path: the file to write.

    Raises:
        Stopped: the file could not be written.
    """
    labels = [problem.label for problem in found.plan.problems]
    several = len(labels) > 1
    families = {family.problem: family for family in found.judgement.families}
    parts = [part for problem in found.plan.problems for part in _problem(found, problem, families, several)]
    return write_page(
        path,
        f"Comparison of {len(found.plan.arms)} arms on {', '.join(labels)}",
        tag("p", _subtitle(found), class_="soft"),
        *(_verdict(found, families[label], several) for label in labels),
        section("What was compared", _facts(found)),
        *parts,
        _overall(found),
        section("Sample completions", completions(found), closed=True),
        section("Every difference, in each metric", differences_table(found), closed=True),
        section("Every run", runs_table(found), closed=True),
        section("To repeat, and to cite", *_origin(found), closed=True),
    )


def _subtitle(found: Comparison) -> str:
    ours = [record for record in found.records if record.run.role == "comparison"]
    failed = sum(record.state != "finished" for record in ours)
    return (
        f"{len(ours)} runs over {len(found.plan.seeds)} seeds, {failed or 'none'} of them failed; made with "
        f"tokenrl {found.versions.get('tokenrl', '')}"
    )


def _verdict(found: Comparison, family: Family, several: bool) -> Html:
    """Say in plain words what was found on a problem, then each difference, and what to keep in mind."""
    heading = f"Verdict on {family.problem}" if several else "Verdict"
    lines = [tag("li", sentence(one, family.margin)) for one in family.differences]
    if len(lines) > 1:
        rest = f"Each was compared with {family.reference}; they were not compared with each other."
        lines.append(tag("li", rest, class_="soft"))
    caveats = [tag("li", text) for text in found.findings.get(family.problem, ())]
    mind = [tag("p", tag("b", "To keep in mind")), tag("ul", *caveats)] if caveats else []
    return section(
        heading, tag("div", tag("b", headline(family)), tag("ul", *lines), *mind, class_="card verdict")
    )


def _facts(found: Comparison) -> Html:
    plan = found.plan
    rows = [
        ["Arms", ", ".join(f"{arm.label} ({arm.bias})" for arm in plan.arms)],
        ["Reference", plan.reference],
        ["Metric that decides", f"{plan.metric}: {SCORES[plan.metric].words}"],
        *(
            [_on(problem, several=len(plan.problems) > 1), _budget(plan, problem)]
            for problem in plan.problems
        ),
        ["Seeds", _seeds(plan)],
        ["Learning rates", _rates(plan)],
        ["Intervals", _level(found)],
    ]
    return tag("div", table(["", ""], rows), class_="words")


def _on(problem: Problem, *, several: bool) -> str:
    return f"Budget on {problem.label}" if several else "Budget"


def _budget(plan: Plan, problem: Problem) -> str:
    margin = plan.margins[problem.label]
    limit = "no margin of equivalence" if margin is None else f"margin of equivalence {margin:g}"
    model = "" if problem.kind == "control" else f"model {problem.settings.get('model') or 'of the task'}; "
    return f"{problem.budget:,} {problem.unit} for each run of every arm; {model}{limit}"


def _seeds(plan: Plan) -> str:
    other = {"tuning": plan.tuning_seeds, "the reference against itself": plan.itself_seeds}
    named = [f"{span(seeds)} for {what}" for what, seeds in other.items() if seeds]
    return "; ".join([f"{span(plan.seeds)}, the same for every arm", *named])


def _rates(plan: Plan) -> str:
    if plan.tuning_seeds:
        return "for each arm the best of a grid, chosen on seeds of their own"
    return (
        ", ".join(f"{problem.learning_rate:g} on {problem.label}" for problem in plan.problems)
        + ", for every arm that names no other"
    )


def _level(found: Comparison) -> str:
    levels = {one.level for family in found.judgement.families for one in family.differences}
    level = ", ".join(f"{level:.2%}" for level in sorted(levels))
    return (
        "Student-t, of the mean difference paired by seed. The verdict is read from the interval at "
        f"{level}, so that with 95 % all intervals on a problem hold together. Where one arm hardly varies "
        "and single runs of another end far from its rest, they hold less often: look at the single runs too."
    )


def _problem(
    found: Comparison, problem: Problem, families: dict[str, Family], several: bool
) -> Iterator[Html]:
    """Yield the sections on one problem."""
    on = f" on {problem.label}" if several else ""
    unit = SCORES[found.plan.metric].words
    yield section(f"Differences to {found.plan.reference}{on}", forest(families[problem.label], unit))
    yield section(f"Learning{on}", learning_curves(found, problem))
    yield section(f"Arms{on}", arms_table(found, problem, families[problem.label]))
    yield section(f"Samples to a threshold{on}", *thresholds(found, problem))
    yield section(f"Learning rates{on}", *sensitivity(found, problem))
    yield section(f"Noise of the gradient, against learning{on}", *noise(found, problem))
    yield section(f"Validity{on}", gates_table(found, problem))


def _overall(found: Comparison) -> Html:
    if found.overall is None:
        return Html()
    rows = [
        [arm, f"{shown(i.value)} [{shown(i.low)}, {shown(i.high)}]"] for arm, i in found.overall.arms.items()
    ]
    words = (
        "Scores as shares of the range of the reward, pooled over the problems. This describes each arm by "
        f"itself and decides nothing: {found.overall.method}."
    )
    heading = ["arm", f"interquartile mean, {found.overall.level:.0%} interval"]
    return section(
        "All problems together",
        tag("p", words, class_="soft"),
        table(heading, rows),
        performance_profiles(found),
    )


def _origin(found: Comparison) -> list[Html]:
    version = found.versions.get("tokenrl", "")
    return [
        preformatted(found.plan.command or FROM_PYTHON),
        tag("p", f"Processor: {processor()}. The last command took {duration(found.wall_seconds)}."),
        preformatted(found.versions),
        preformatted(CITATION.format(version=version)),
        tag("p", "The plan, as it was written before anything was run:"),
        preformatted(json.loads((found.output_dir / "plan.json").read_text(encoding="utf-8"))),
    ]
