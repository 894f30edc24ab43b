"""Write the demo's results as a page. Every sentence that judges is chosen by the numbers it speaks of."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image

from qrlora.apps.demo.flow import PARTS, SETS, Answer, Outcome
from qrlora.apps.demo.numbers import AIMS, crosstalk_of, data, versions
from qrlora.apps.demo.plan import (
    AIM,
    DEFAULT,
    METHODS,
    TRAINING_STYLE,
    TRAINING_SUBJECT,
    Task,
    null_space_of,
    weights_of,
)
from qrlora.lab.compare.plan import rate_of
from qrlora.models.generation import labelled_grid
from qrlora.models.training.pictures import open_picture
from qrlora.pico import world
from qrlora.quality.metrics.shares import Share, difference
from qrlora.quality.report import (
    Bars,
    Block,
    Code,
    Equation,
    Figure,
    Figures,
    Gallery,
    Matrix,
    Picture,
    Prose,
    Report,
    Section,
    Table,
)

NAMES = {"qrlora": "QR-LoRA", "qrlora_published": "QR-LoRA, as published", "lora": "LoRA"}
TITLES = {
    "subject_alone": "Subject alone, in other styles",
    "style_alone": "Style alone, on other subjects",
    "composed": "Composed",
}


def report(outcome: Outcome) -> Report:
    """Make the page and its data."""
    setting = outcome.setting
    model = "pico, the model that ships with qrlora" if setting.model == "pico" else setting.model
    size = sum(p.numel() for p in setting.family.denoiser_of(setting.pipe).parameters())
    subtitle = (
        "A subject learned from one picture and a style learned from another, put together in one file. "
        f"Base model: {model}, with {size / 1e6:.1f} million parameters in its denoiser. "
        f"Trained, generated and judged on this machine in {_duration(sum(setting.seconds.values()))}."
    )
    parts = (_opening, _subject, _style, _grid, _methods, _scores, _interference, _costs, _time, _reading)
    return Report(
        title="Two pictures in, both together out",
        subtitle=subtitle,
        sections=[part(outcome) for part in parts],
        data=data(outcome),
        footer="Written by qrlora demo. Beside this page: its numbers in report.json, the run in one picture in "
        "summary.png, the adapters in adapters/.",
    )


def summary(outcome: Outcome) -> Image.Image:
    """Summarise the run in one picture: the two pictures learned from, their composition, the subject in other styles,
    the style elsewhere."""
    learned = [np.asarray(open_picture(one.file).image) for one in (outcome.subject, outcome.style)]
    composed, *alone = (list(outcome.answers[DEFAULT][name].pixels) for name in ("composed", *SETS[:2]))
    rows = [[*learned, *composed], *alone]
    count = min(6, *(len(row) for row in rows))
    cells = [[Image.fromarray(pixels) for pixels in row[:count]] for row in rows]
    labels = ["learned from, then both", "the subject elsewhere", "the style elsewhere"]
    heads = ["the subject", "the style", *[""] * (count - 2)]
    return labelled_grid(cells, labels, heads[:count])


# the top of the page


def _opening(outcome: Outcome) -> Section:
    composed = outcome.answers[DEFAULT]["composed"]
    learned = [
        Picture(
            np.asarray(open_picture(task.file).image),
            f"{task.about}: the picture that the {task.role} was learned from",
            f"The {task.role}, from one picture: {task.about}. In prompts: {task.trigger}",
            enlarge=3,
        )
        for task in (outcome.subject, outcome.style)
    ]
    result = Picture(
        composed.pixels[0],
        f"generated: {outcome.subject.called} in the style of {outcome.style.called}",
        f"“{composed.wanted[0].prompt}”, the first seed",
        _marks(composed, 0),
        enlarge=4,
    )
    figures = Figures([*_aim_figures(outcome), *_size_figures(outcome)])
    return Section("", [Equation(learned, result), figures, *_findings(outcome)])


def _aim_figures(outcome: Outcome) -> list[Figure]:
    figures = []
    for name, meaning in AIMS.items():
        share = outcome.share(DEFAULT, name, "both")
        if share is not None:
            reached = share.value >= AIM
            note = f"{share}. Aim {_percent(AIM)}: {'reached' if reached else 'missed'}"
            figures.append(Figure(_percent(share.value), meaning, note, "good" if reached else "bad"))
    return figures


def _size_figures(outcome: Outcome) -> list[Figure]:
    numbers, rank = data(outcome), outcome.setting.budget.rank
    parameters, sizes = numbers["parameters"], numbers["file_bytes"]
    counts = f"{parameters[DEFAULT]:,} against {parameters['lora']:,}, both at rank {rank}"
    kib = f"{sizes['compact'] / 1024:,.0f} against {sizes['plain_lora'] / 1024:,.0f} KiB"
    cosine = f"{outcome.interference[DEFAULT]['cosine']:.4f}"
    return [
        Figure(f"{parameters['ratio']:.3f}", "of LoRA's trainable parameters", counts),
        Figure(f"{sizes['ratio']:.3f}", "of LoRA's file", kib),
        Figure(cosine, "cosine of the two weight changes", "their interference, known before a picture is made"),
    ]


def _findings(outcome: Outcome) -> list[Block]:
    """State the conclusions: which aims are met, how the methods compare, what was not judged."""
    shares = {name: outcome.share(DEFAULT, name, "both") for name in AIMS}
    counted = {name: share.value >= AIM for name, share in shares.items() if share is not None}
    missed = [AIMS[name] for name, reached in counted.items() if not reached]
    blocks: list[Block] = []
    if missed:
        are = "is" if len(missed) == 1 else "are"
        blocks.append(Prose([f"{len(missed)} of {len(counted)} aims {are} missed: {'; '.join(missed)}."], "bad"))
    elif counted:
        blocks.append(
            Prose([f"All {len(counted)} aims are reached." if len(counted) > 1 else "The aim is reached."], "good")
        )
    for baseline in METHODS:
        text, tone = _against(outcome, baseline) if baseline != DEFAULT else ("", "")
        blocks += [Prose([text], tone)] if text else []
    unjudged = _unjudged(outcome)
    return blocks + ([Prose([unjudged], "note")] if unjudged else [])


def _against(outcome: Outcome, baseline: str) -> tuple[str, str]:
    """Compare the default with a baseline on composed pictures; return sentence and tone, empty if unjudged."""
    shares = {part: [outcome.share(method, "composed", part) for method in (DEFAULT, baseline)] for part in PARTS}
    part = next((part for part in ("both", "style", "subject") if None not in shares[part]), None)
    if part is None:
        return "", ""
    mine, yours = (share for share in shares[part] if share is not None)
    what = "both" if part == "both" else f"the {part}"
    gap, (low, high) = difference(mine, yours)
    ours, theirs = NAMES[DEFAULT], NAMES[baseline]
    numbers = (
        f"{what} right in {_percent(mine.value)} against {_percent(yours.value)} of the composed pictures, "
        f"a difference of {_points(gap)} points (95% interval {_points(low)} to {_points(high)})"
    )
    if low > 0:
        return f"{ours} beats {theirs} here: {numbers}.", "good"
    if high < 0:
        return f"{theirs} beats {ours} here: {numbers}.", "bad"
    ahead = f"{ours if gap > 0 else theirs} is ahead, but not by more than chance allows"
    return f"{ours} and {theirs}: {numbers}. With this many pictures: {'level' if gap == 0 else ahead}.", "note"


def _unjudged(outcome: Outcome) -> str:
    """Explain missing scores, if any."""
    own = [task.role for task in (outcome.subject, outcome.style) if task.name is None]
    if not own:
        return ""
    text = (
        f"The {' and the '.join(own)} came from a picture of your own. The judge knows only pico's world and cannot "
        f"say whether your {' or your '.join(own)} is right, so these scores are left out rather than guessed."
    )
    mine, base = outcome.answers[DEFAULT]["composed"].likeness, outcome.base.likeness
    if mine is None or base is None:
        return text
    return (
        f"{text} What can be measured is how alike your picture and the composed ones are to the judge: a cosine of "
        f"{mine:.2f} between its features. For pictures by the base model, which never saw yours: {base:.2f}."
    )


# pictures


def _subject(outcome: Outcome) -> Section:
    subject, answer = outcome.subject, outcome.answers[DEFAULT]["subject_alone"]
    words = [str(one.style) for one in answer.wanted]
    shown = f"in {TRAINING_STYLE} style only" if subject.name else "one photograph only"
    lead = f"The subject adapter alone. It was shown {shown}; these styles the base model knew before."
    return Section(f"{subject.called.capitalize()} in other styles", [Gallery(_gallery(answer, words))], lead)


def _style(outcome: Outcome) -> Section:
    style, answer = outcome.style, outcome.answers[DEFAULT]["style_alone"]
    words = [f"{one.colour} {one.subject}" for one in answer.wanted]
    shown = f"on a {TRAINING_SUBJECT} only" if style.name else "one picture only"
    lead = f"The style adapter alone. It was shown {shown}; these subjects the base model knew before."
    what = f"{style.name} style" if style.name else "the style of your picture"
    return Section(f"Other subjects in {what}", [Gallery(_gallery(answer, words))], lead)


def _gallery(answer: Answer, words: Sequence[str]) -> list[Picture]:
    """Return every picture that is counted, with what it was asked to show."""
    return [
        Picture(pixels, f"generated: {one.prompt}", word, _marks(answer, i))
        for i, (one, word, pixels) in enumerate(zip(answer.wanted, words, answer.pixels, strict=True))
    ]


def _marks(answer: Answer, index: int) -> list[tuple[str, bool]]:
    verdicts = {part: answer.right[part] for part in ("subject", "style")}
    return [(part, bool(found[index])) for part, found in verdicts.items() if found is not None]


def _grid(outcome: Outcome) -> Section:
    labels = [f"{weight:g}" for weight in outcome.setting.budget.weights]
    cells = [
        [
            Picture(cell.pixels[0], f"subject at {a}, style at {b}", enlarge=2)
            for b, cell in zip(labels, row, strict=True)
        ]
        for a, row in zip(labels, outcome.grid, strict=True)
    ]
    titles = [f"weight of the {one.role} ({one.called})" for one in (outcome.subject, outcome.style)]
    prompt = outcome.grid[0][0].wanted[0].prompt
    lead = f"“{prompt}”, one seed. At 0 an adapter is absent, at 1 it is as trained; two are composed with "
    lead += f"null-space projection {null_space_of(DEFAULT, outcome.learned[DEFAULT]):g}."
    return Section("Both, in any proportion", [Matrix(labels, labels, cells, *titles)], lead)


def _methods(outcome: Outcome) -> Section:
    """Show all methods and the base model side by side: a picture of each prompt, or of each seed if there is one
    prompt."""
    wanted = outcome.answers[DEFAULT]["composed"].wanted
    firsts = {one.prompt: i for i, one in reversed(list(enumerate(wanted)))}
    shown = sorted(firsts.values() if len(firsts) > 1 else range(len(wanted)))[:8]
    rows = {NAMES[method]: sets["composed"] for method, sets in outcome.answers.items()} | {"No adapter": outcome.base}
    cells = [
        [Picture(a.pixels[i], f"{name}: {a.wanted[i].prompt}", marks=_marks(a, i)) for i in shown]
        for name, a in rows.items()
    ]
    strength = null_space_of(DEFAULT, outcome.learned[DEFAULT])
    columns = [wanted[i].colour or f"seed {wanted[i].seed}" for i in shown]
    lead = (
        "Same rank, steps and pictures for all; each at its own learning rates and weights, the best of a few on other "
        f"subjects and styles. {NAMES[DEFAULT]}'s two are composed with null-space projection {strength:g}: each loses "
        f"{strength:g} of what lies in the input directions that the other reads. The others' are summed. Last row: "
        "the base model, asked in plain words."
    )
    return Section("Three methods, the same prompts and seeds", [Matrix(list(rows), columns, cells)], lead)


# numbers


def _scores(outcome: Outcome) -> Section:
    rows: list[list[str | Share | None]] = []
    for name, title in TITLES.items():
        shares = {part: [outcome.share(method, name, part) for method in METHODS] for part in PARTS}
        known = {part: row for part, row in shares.items() if any(row)}
        rows += [[title], *([f"{part} right", *row] for part, row in known.items())] if known else []
        seen = [outcome.share(method, name, "recognised") for method in METHODS]
        rows += [["both recognised", *seen]] if any(seen) else []
    lost = [crosstalk_of(sets) for sets in outcome.answers.values()]
    losses: list[list[str | Share | None]] = [
        [part, *(_points(one[part]) for one in lost)] for part in PARTS if lost[0][part] is not None
    ]
    rows += [["Crosstalk, in points"], *losses] if losses else []
    note = (
        "A bar is the share of pictures that are right, the line over it its 95% interval (Wilson). Recognised: of all "
        f"{len(world.SUBJECTS)} subjects and {len(world.STYLES)} styles of pico's world, the judge takes the two asked "
        "for to be the likeliest, however they are drawn. Crosstalk is the "
        "probability that the judge gives the right name among all of the world's, alone minus composed; under “both”, "
        "the mean of the two."
    )
    header = ["", *(NAMES[method] for method in METHODS)]
    return Section("How many are right", [Table(header, rows, note)], "Counted by pico's judge.")


def _interference(outcome: Outcome) -> Section:
    mine = outcome.interference[DEFAULT]
    cosines = [f"{NAMES[m]} {outcome.interference[m]['cosine']:+.4f}" for m in METHODS if m != DEFAULT]
    why = ", zero by construction: subject and style own disjoint columns of one orthonormal basis"
    text = (
        f"The weight changes of the two {NAMES[DEFAULT]} adapters have a cosine of {mine['cosine']:.4f}"
        f"{why if mine['shared_columns'] == 0 else ''}. They share {_percent(mine['shared_rows'])} of the input "
        f"directions that they read; unrelated ones would share {_percent(mine['shared_rows_by_chance'])}. "
        f"Cosines of the others: {', '.join(cosines)}."
    )
    return Section("Interference, known before a picture is made", [Prose([text])])


def _costs(outcome: Outcome) -> Section:
    numbers, seconds = data(outcome), outcome.setting.seconds
    parameters, sizes = numbers["parameters"], numbers["file_bytes"]
    rows: list[list[str | Share | None]] = [
        [
            NAMES[method],
            f"{parameters[method]:,}",
            f"{parameters[method] / parameters['lora']:.4f}",
            ", ".join(f"{rate_of(method, one.role, one.name):g}" for one in (outcome.subject, outcome.style)),
            ", ".join(f"{weight:g}" for weight in weights_of(method, outcome.subject, outcome.style)),
            f"{seconds[f'train {method}']:.1f} s",
        ]
        for method in METHODS
    ]
    files: list[list[str | Share | None]] = [
        ["compact: ΔR alone, for qrlora", f"{sizes['compact']:,}"],
        ["the same adapter spelled as a LoRA, for any loader", f"{sizes['lora']:,}"],
        ["LoRA of the same rank", f"{sizes['plain_lora']:,}"],
    ]
    tuned = ["learning rates: subject, style", "weights, composed"]
    header = ["One adapter", "trained parameters", "of LoRA's", *tuned, "training of both"]
    return Section("What it costs", [Table(header, rows), Table(["File of the subject", "bytes"], files)])


def _time(outcome: Outcome) -> Section:
    seconds = outcome.setting.seconds
    bars = [(_stage(name), value, f"{value:.1f} s") for name, value in seconds.items()]
    return Section("Where the time went", [Bars(bars)], f"{_duration(sum(seconds.values()))} in all, after imports.")


def _stage(name: str) -> str:
    """Describe a stage, whose key names a method by its key."""
    first, _, method = name.partition(" ")
    return f"{first} {NAMES[method]}" if method in NAMES else name


def _reading(outcome: Outcome) -> Section:
    budget = outcome.setting.budget
    lines = [
        *_reserved([outcome.subject, outcome.style]),
        "Nothing is picked: the large picture is the first prompt at the first seed, and both galleries show every "
        "picture that is counted.",
        "“Right” is strict. The judge, a small network trained on true drawings of the whole world, must name the "
        "subject or style; and the picture must lie as close to true drawings of it, in features and (for a style) in "
        "colours, as true drawings do. For both to be right it must besides lie as close to true drawings of that very "
        "subject in that very style.",
        f"This is one run with one subject and one style, and about {budget.pictures} pictures a score. The intervals "
        "say what chance alone could do; they do not cover another subject, style or seed.",
        f"Each adapter has rank {budget.rank} and was trained for {budget.steps} steps of {budget.batch_size} "
        f"examples, all of one picture, called “{outcome.subject.caption}” and “{outcome.style.caption}”. "
        f"Pictures take {budget.denoising_steps} denoising steps at guidance {budget.guidance:g}.",
    ]
    made = ", ".join(f"{name} {number}" for name, number in versions().items())
    return Section(
        "How to read this page", [Prose(lines, listed=True), Code(outcome.command), Prose([f"With {made}."])]
    )


def _reserved(tasks: Sequence[Task]) -> list[str]:
    names = [task.name for task in tasks if task.name in (*world.RESERVED_SUBJECTS, *world.RESERVED_STYLES)]
    told = " or ".join(f"“{name}”" for name in names)
    return [f"The base model was trained without {told}: it saw neither such pictures nor the words."] if names else []


# words


def _percent(value: float) -> str:
    return f"{100 * value:.0f}%"


def _points(value: float | None) -> str | None:
    if value is None:
        return None
    return f"{100 * value:+.0f}".replace("-", "−") if abs(value) >= 0.005 else "0"


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
