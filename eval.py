"""eval.py: everything that looks at a run.

    python eval.py show runs/toy                     runs/toy/curves.png and runs/toy/groups.html
    python eval.py show runs/grpo runs/tgrl          the same for each run, and runs/curves.png with both in one figure
    python eval.py bench --model 3B                  what a step costs here: rollout, scoring, update; random weights, no download

`show` reads what training wrote, metrics.jsonl and groups.jsonl, and nothing else: no model, no torch. It can be used
while the training is still running. groups.html is one file without links to anything, to be mailed or archived as it is.
"""

import argparse
import base64
import collections
import hashlib
import html
import json
import math
import os
import re
import sys
import typing
from pathlib import Path


class BadRun(ValueError):
    """A run that cannot be shown: the message says what is missing and what to do."""


# ======================================================================================================================
# Reading a run
# ======================================================================================================================


class Run(typing.NamedTuple):
    folder: Path
    config: dict
    steps: list[dict]  # metrics.jsonl without its first line
    groups: list[dict]
    name: str


def read_lines(path: Path) -> list:
    """The records of a .jsonl file. A torn last line is what a killed, or a running, training leaves: skipped, and said."""
    if not path.is_file():
        raise BadRun(f"there is no {path}; give the folder that `tgrl.py train --out` wrote, once its first step is done")
    lines, records = path.read_text(encoding="utf-8", errors="replace").splitlines(), []
    for number, line in enumerate(lines, 1):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise BadRun(f"line {number} of {path} is not JSON; remove that line, or train again") from None
            print(f"{path}: the last line, {number}, is incomplete and left out", file=sys.stderr)
    return records


def read_run(folder: Path) -> Run:
    if not folder.is_dir():
        raise BadRun(f"there is no folder {folder}; give the folder that `tgrl.py train --out` wrote")
    header, *steps = read_lines(folder / "metrics.jsonl") or [{}]
    if not steps or "method" not in header:
        raise BadRun(f"{folder / 'metrics.jsonl'} has no finished step; wait for the first step, or train again")
    groups = read_lines(folder / "groups.jsonl")
    if not groups:
        raise BadRun(f"{folder / 'groups.jsonl'} has no groups; wait for the first step, or train again")
    config = header["config"]
    return Run(folder, config, steps, groups, header["method"])


def with_unique_names(runs: list[Run]) -> list[Run]:
    """By the folder's name where the algorithm is the same, by the whole path where that is the same too."""
    for suffix in (lambda run: run.folder.name, lambda run: str(run.folder)):
        count = collections.Counter(run.name for run in runs)
        runs = [run._replace(name=f"{run.name} ({suffix(run)})") if count[run.name] > 1 else run for run in runs]
    return runs


# ======================================================================================================================
# curves.png
# ======================================================================================================================


class Panel(typing.NamedTuple):
    title: str
    lines: dict[str, str]  # metric -> its name in the legend of the panel; the first is solid, the second dashed
    percent: bool = False
    from_zero: bool = True


PANELS = (
    Panel("Held-out accuracy", {"accuracy": ""}, percent=True, from_zero=False),
    Panel("Reward", {"reward": "policy", "expert_reward": "expert"}),
    Panel("Groups with contrast", {"contrast": "all", "rescued_by_expert": "only thanks to the expert"}, percent=True),
    Panel("Wrong answers that the policy put right", {"rectified": ""}, percent=True),
    Panel("Entropy of the policy (nats)", {"entropy": ""}),
    Panel(r"Expert tokens: coefficient $\tilde{r}$ (Eq. 23)", {"expert_coefficient": ""}),
    Panel(r"Expert tokens: $\Delta$ (Eq. 18, nats)", {"expert_delta": ""}, from_zero=False),
    Panel("Gradient norm", {"grad_norm": ""}),
    Panel("Tokens an answer", {"answer_tokens": ""}),
    Panel("Seconds a step", {"seconds": "all", "seconds_rollout": "rollouts"}),
)
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")  # Okabe and Ito: safe for the colour-blind
GREY = "#5b6470"


def draw_curves(runs: list[Run], path: Path):
    """Small multiples: one panel a quantity, one colour a run. What no run has measured gets no panel."""
    import matplotlib
    import numpy as np
    from matplotlib.figure import Figure  # not pyplot: no window and no global state, PNGs are drawn by Agg
    from matplotlib.lines import Line2D
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    def points(run, metric):
        if metric == "rescued_by_expert" and not run.config["n_off"]:
            return np.empty((2, 0))  # a line of zeros would say that there was an expert
        pairs = [(record["step"], record[metric]) for record in run.steps if isinstance(record.get(metric), int | float)]
        return np.array([pair for pair in pairs if math.isfinite(pair[1])], dtype=float).reshape(-1, 2).T

    panels = [p for p in PANELS if any(points(run, metric).size for run in runs for metric in p.lines)]
    if not panels:
        raise BadRun(f"{runs[0].folder / 'metrics.jsonl'} has no number to draw; train again")
    columns = min(4 if len(panels) in (4, 7, 8) else 3, len(panels))
    rows = math.ceil(len(panels) / columns)
    last = max(1, *(record["step"] for run in runs for record in run.steps))
    style = {"font.size": 9, "axes.titlesize": 10, "axes.titlelocation": "left", "axes.spines.top": False, "axes.spines.right": False,
             "axes.edgecolor": "#9aa3ad", "axes.grid": True, "grid.color": "#e6e9ed", "xtick.color": GREY, "ytick.color": GREY}  # fmt: skip
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(3.8 * columns, 2.6 * rows + 0.9), dpi=150, layout="constrained")
        all_axes = figure.subplots(rows, columns, squeeze=False).flatten()
        for axes, panel in zip(all_axes, panels):
            drawn = {}
            for i, run in enumerate(runs):
                for (metric, label), dash in zip(panel.lines.items(), ("-", (0, (4, 2)))):
                    x, y = points(run, metric)
                    if not x.size:
                        continue
                    # accuracy is measured rarely, on all held-out questions: each point counts. The rest is noise around a trend
                    width = 1 if metric == "accuracy" else len(y) // 15 * 2 + 1
                    window = np.hanning(width + 2)[1:-1]
                    mean = np.convolve(y, window, "same") / np.convolve(np.ones(len(y)), window, "same")
                    color = COLORS[i % len(COLORS)]
                    marker = "o" if metric == "accuracy" or len(y) == 1 else None
                    axes.plot(x, mean, color=color, linestyle=dash, linewidth=1.7, marker=marker, markersize=3.5, clip_on=False)
                    if width > 1:
                        axes.plot(x, y, color=color, linewidth=0.7, alpha=0.3)
                    drawn[label] = Line2D([], [], color=GREY, linestyle=dash)
            axes.set_title(panel.title)
            if panel.from_zero:
                axes.set_ylim(bottom=0)  # a small change shall look small
            if panel.percent:
                axes.set_ylim(bottom=max(0, axes.get_ylim()[0]))
                axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=None))
            axes.set_xlim(-0.03 * last, 1.03 * last)
            axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=7, steps=[1, 2, 5, 10]))
            if len(drawn) > 1:
                axes.legend(drawn.values(), drawn, frameon=False, fontsize=8, labelcolor=GREY, loc="best")
        for axes in all_axes[len(panels) :]:
            axes.remove()
        for axes in all_axes[max(0, len(panels) - columns) : len(panels)]:  # the lowest of each column
            axes.set_xlabel("step", color=GREY)
        handles = [Line2D([], [], color=COLORS[i % len(COLORS)], linewidth=2.5) for i in range(len(runs))]
        figure.legend(handles, [run.name for run in runs], loc="outside upper left", ncols=4, frameon=False, fontsize=11)
        if any(len(run.steps) > 15 for run in runs):
            figure.supxlabel("thin: each step; thick: weighted mean over the steps around it", fontsize=8, color=GREY, x=0.99, ha="right")
        figure.savefig(path, facecolor="white")


# ======================================================================================================================
# groups.html: all text of models and data is escaped here, and no script ever turns text into markup
# ======================================================================================================================

CSS = """
:root { color-scheme: light dark; --page: #f6f7f9; --card: #fff; --ink: #1c2128; --soft: #59636e; --line: #dde1e6; --code: #f3f5f7;
  --heat: #64aaf0; --grey: #a8b0b9; --right: #116b4d; --wrong: #a3401a; --accent: #0b5ca8; }
@media (prefers-color-scheme: dark) { :root { --page: #0f1216; --card: #171b21; --ink: #e4e8ed; --soft: #9aa5b1; --line: #2c333c;
  --code: #1d2229; --heat: #2870c0; --grey: #555e69; --right: #5fc9a0; --wrong: #f0986c; --accent: #79b8f5; } }
* { box-sizing: border-box; }
[hidden] { display: none !important; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.55 system-ui, sans-serif; overflow-wrap: anywhere; }
header, main { max-width: 1240px; margin: 0 auto; padding: 0 20px; }
h1 { font-size: 23px; margin: 28px 0 2px; }
h2 { font-size: 17px; margin: 26px 0 10px; }
h3 { font-size: 12px; margin: 14px 0 3px; color: var(--soft); font-weight: 600; }
.soft, summary, dd { color: var(--soft); }
header p { max-width: 78ch; }
dl { display: grid; grid-template-columns: max-content minmax(0, 1fr); gap: 5px 18px; margin: 14px 0; max-width: 100ch; }
dt { white-space: nowrap; font-family: Georgia, serif; } dd { margin: 0; }
nav { position: sticky; top: 0; z-index: 1; background: var(--page); border-bottom: 1px solid var(--line); }
nav > div { max-width: 1240px; margin: 0 auto; padding: 9px 20px; display: flex; gap: 8px 20px; align-items: center; }
nav ol { display: flex; gap: 4px; flex: 1; min-width: 0; overflow-x: auto; scrollbar-width: thin; list-style: none; margin: 0;
  padding: 3px; }
nav a { display: block; white-space: nowrap; padding: 2px 10px; border-radius: 6px; color: var(--ink); text-decoration: none; }
nav a:hover { background: var(--line); }
nav a[aria-current=true] { background: var(--accent); color: var(--card); }
.scale { display: flex; align-items: center; gap: 6px; font-size: 13px; white-space: nowrap; }
.scale i { width: 11px; height: 14px; } .scale span { display: flex; border: 1px solid var(--line); border-radius: 3px; overflow: hidden; }
section { scroll-margin-top: 56px; content-visibility: auto; contain-intrinsic-height: auto 3000px; }
.group { display: grid; grid-template-columns: 300px minmax(0, 1fr); gap: 8px 28px; background: var(--card); border: 1px solid var(--line);
  border-radius: 12px; padding: 18px 20px; margin: 0 0 20px; }
.group img { display: block; max-width: 100%; max-height: 320px; margin: 4px 0 10px; background: #fff; border: 1px solid var(--line);
  border-radius: 6px; }
.ask { align-self: start; position: sticky; top: 66px; } .ask > h3:first-child { margin-top: 4px; }
.text { white-space: pre-wrap; unicode-bidi: isolate; } .text b { color: var(--soft); font-weight: 500; font-size: 13px; }
.answer { border-top: 1px solid var(--line); padding: 11px 0 12px; } .answer:first-child { border-top: 0; padding-top: 2px; }
.facts { display: flex; flex-wrap: wrap; gap: 3px 14px; align-items: baseline; margin-bottom: 5px; font-size: 13px; color: var(--soft); }
.facts strong { color: var(--ink); } .right, .wrong { font-weight: 650; } .right { color: var(--right); } .wrong { color: var(--wrong); }
.mark { border: 1px solid currentColor; border-radius: 5px; padding: 0 6px; color: var(--wrong); }
.answer > .text, details .text { font-size: 14px; }
details[open] .teaser, details:not([open]) .less { display: none; }
summary { cursor: pointer; } .teaser { color: var(--ink); font-size: 14px; }
.tokens { background: var(--code); border-radius: 8px; padding: 10px 12px; line-height: 1.8; }
.tokens i, .scale i { font-style: normal; }
.tokens i { padding: 2px 0; border-radius: 2px; box-shadow: inset -1px 0 var(--code); unicode-bidi: isolate; }
.tokens s { text-decoration: none; color: var(--soft); font-size: 11px; user-select: none; }
.filtered { --heat: var(--grey); } .gone { color: var(--soft); text-decoration: line-through; } s.mark { text-decoration: none; }
.text sup { color: var(--accent); font-size: 10px; padding-left: 2px; }
.tokens i:hover, .tokens i:focus { outline: 2px solid var(--ink); outline-offset: 1px; }
#tip { position: absolute; z-index: 2; padding: 9px 13px; border-radius: 8px; background: var(--ink); color: var(--card); font-size: 13px;
  line-height: 1.5; pointer-events: none; box-shadow: 0 4px 16px #0004; }
#tip table { border-spacing: 0; } #tip td { padding: 0; text-align: right; font-variant-numeric: tabular-nums; }
#tip th { font-weight: 400; text-align: left; padding: 0 18px 0 0; }
#tip caption { text-align: left; font: 600 14px/1.4 ui-monospace, monospace; padding-bottom: 4px; max-width: 300px; }
@media (max-width: 760px) { header, main { padding: 0 12px; } .group { grid-template-columns: minmax(0, 1fr); padding: 14px; }
  .ask { position: static; } section { scroll-margin-top: 76px; }
  nav > div { flex-wrap: wrap; padding: 6px 12px; } nav ol { flex-basis: 75%; }
  dl { grid-template-columns: minmax(0, 1fr); gap: 0; } dt { white-space: normal; } dd { margin-bottom: 9px; } }
""" + "\n".join(f".w{i} {{ background: color-mix(in srgb, var(--heat) {10 * i}%, transparent); }}" for i in range(11))

SCRIPT = r"""
// one step at a time; the address holds which, so that it can be linked to. Without scripts all steps are shown.
const steps = [...document.querySelectorAll("section")], links = [...document.querySelectorAll("nav a")];
function turn(event) {
  const now = Math.max(0, steps.findIndex(step => "#" + step.id === location.hash));
  steps.forEach((step, i) => { step.hidden = i !== now; links[i].setAttribute("aria-current", i === now); });
  links[now].scrollIntoView({ block: "nearest", inline: "nearest" });
  if (event) steps[now].scrollIntoView();
}
addEventListener("hashchange", turn);
turn();

// the numbers of a token, on hover, touch or keyboard focus
const tip = document.getElementById("tip"), [caption] = tip.getElementsByTagName("caption"), cells = tip.getElementsByTagName("td");
function format(x) {
  return !Number.isFinite(x) ? "\u2013" : (x && Math.abs(x) < 0.001 ? x.toExponential(1) : x.toFixed(3)).replaceAll("-", "\u2212");
}
function inspect(event) {
  const token = event.target.closest?.("[data-v]");
  tip.hidden = !token;
  if (!token) return;
  const [student, expert, w, r] = token.dataset.v.split(" ").map(Number);
  caption.textContent = token.textContent.replace(/\u21b5\n/g, "\u21b5").replace(/ /g, "\u2423").replace(/\t/g, "\u21e5") || "(no text)";
  [student, expert, expert - student, Math.exp(student - expert), w, r].forEach((x, i) => { cells[i].textContent = format(x); });
  token.setAttribute("aria-describedby", "tip");
  const box = token.getClientRects()[0] ?? token.getBoundingClientRect(), below = box.bottom + tip.offsetHeight + 10 < innerHeight;
  tip.style.left = scrollX + Math.max(8, Math.min(box.left, document.documentElement.clientWidth - tip.offsetWidth - 8)) + "px";
  tip.style.top = scrollY + (below ? box.bottom + 6 : box.top - tip.offsetHeight - 6) + "px";
}
addEventListener("pointerover", inspect);
addEventListener("focusin", inspect);
addEventListener("keydown", event => {
  if (event.key === "Escape") tip.hidden = true;
  const token = event.target.closest?.("[data-v]");
  const next = token && { ArrowRight: token.nextElementSibling, ArrowLeft: token.previousElementSibling,
    Home: token.parentElement.firstElementChild, End: token.parentElement.lastElementChild }[event.key];
  if (!next) return;
  event.preventDefault();
  token.tabIndex = -1;  // one stop of the Tab key an answer, not one a token
  next.tabIndex = 0;
  next.focus();
});
"""

EXPERT = """<p><b>The shade of an expert's token is its weight w</b>: the more it stands out, the more the policy is to learn from it.
Point at a token for its numbers, or reach it with Tab and the arrow keys. A &#xFFFD; is part of a character of several tokens.</p>
<dl><dt>&Delta; = log &pi;<sub>expert</sub> &minus; log &pi;<sub>policy</sub></dt>
<dd>Eq. 18. How much the policy underestimates the token.</dd>
<dt>&rho; = &pi;<sub>policy</sub> / &pi;<sub>expert</sub></dt>
<dd>Eq. 17. The importance ratio: the expert wrote the token, not the policy.</dd>
<dt>w = sigmoid(&beta; &middot; (&Delta; &minus; mean) / std)</dt>
<dd>Eq. 19&ndash;20. &Delta; compared with the other tokens of the same answer: near 1 where the policy underestimates most. {beta}</dd>
<dt>r&#771; = m &middot; w &middot; &rho;</dt>
<dd>Eq. 21&ndash;23. What multiplies the advantage in the loss, before clipping. m is 0 for a wrong answer of an expert, which so
teaches nothing, else 1 (Eq. 22). {filter}</dd></dl>"""
NO_EXPERT = "<p>This run has no expert, and so no tokens are shaded.</p>"

PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<title>{title}</title><style>{css}</style></head><body>
<header><h1>{title}</h1><p class="soft">{subtitle}</p>
<p>Each card is one group as it was trained on: a question and all its answers, of the policy and of an expert, which is a stronger model or the policy on a second look.
A rule grades them. The advantage says how far an answer's reward lies above or below the mean of its group (Eq. 14&ndash;16).</p>
{expert}</header>
<nav aria-label="recorded steps"><div><span class="soft">Step</span><ol>{links}</ol>{scale}</div></nav>
<main>{steps}</main>
<div id="tip" role="tooltip" hidden><table><caption></caption>
<tr><th>log-prob, policy</th><td></td></tr><tr><th>log-prob, expert</th><td></td></tr><tr><th>&Delta; &ensp;Eq. 18</th><td></td></tr>
<tr><th>&rho; &ensp;Eq. 17</th><td></td></tr><tr><th>w &ensp;Eq. 20</th><td></td></tr>
<tr><th>r&#771; &ensp;Eq. 23</th><td></td></tr></table></div>
<script>{script}</script></body></html>
"""
SCALE = f"""<div class="scale" role="img" aria-label="shades of the weight w, none for 0, full for 1">
w&ensp;0<span>{"".join(f'<i class="w{i}"></i>' for i in range(11))}</span>1</div>"""


def token_html(token: str, values: tuple, first: bool) -> str:
    """A shaded token. `values` are log-probs of policy and expert, w, r~; the script computes the other two numbers."""
    shade = round(10 * min(max(values[2], 0.0), 1.0)) if math.isfinite(values[2]) else 0
    shown = html.escape(token).replace("\n", "<s>↵</s>\n")
    return f'<i class="w{shade}" data-v="{" ".join(f"{x:.5g}" for x in values)}"{" tabindex=0" if first else ""}>{shown}</i>'


def answer_html(answer: dict) -> str:
    expert = answer["source"] != "policy"
    filtered = expert and answer["reward"] != 1 and not any(answer["coefficient"])
    facts = [f"<strong>{html.escape('expert: ' + answer['source'] if expert else 'policy')}</strong>"]
    facts += ['<span class="right">✓ right</span>' if answer["reward"] == 1 else '<span class="wrong">✗ wrong</span>']
    advantage = f"{round(answer['advantage'], 2) + 0.0:+.2f}".replace("-", "−")  # + 0.0: no minus zero
    facts += [f"<span>reward {answer['reward']:g}</span><span>advantage {advantage}</span><span>{len(answer['tokens'])} tokens</span>"]
    facts += ['<span class="mark">cut off</span>'] * (not answer["finished"])
    facts += ['<span class="mark">filtered, m = 0</span><span>grey: the w it would have had</span>'] * filtered
    if expert:
        numbers = zip(answer["logp"], answer["behavior_logp"], answer["weight"], answer["coefficient"])
        tokens = "".join(token_html(token, values, i == 0) for i, (token, values) in enumerate(zip(answer["tokens"], numbers)))
        body = f'<div class="text tokens{" filtered" * filtered}">{tokens}</div>'
    else:
        body = f'<div class="text">{html.escape(answer["text"])}</div>'
        if len(answer["text"]) > 500:
            teaser = html.escape(" ".join(answer["text"].split())[:220] + " …")
            body = f'<details><summary><span class="teaser">{teaser}</span><span class="less">less</span></summary>{body}</details>'
    return f'<div class="answer"><div class="facts">{"".join(facts)}</div>{body}</div>'


def story_html(story: dict) -> str:
    """How the policy made an expert's answer of a wrong one, or tried: each step with its erosion, the cut, and what came after it."""
    steps = "".join(
        '<s class="mark">✂ cut</s> ' * (i == story["cut"]) + f'<span class="{"gone" if i >= story["cut"] else ""}">{html.escape(text)}<sup>{erosion:.1f}</sup></span> '
        for i, (text, erosion) in enumerate(zip(story["steps"], story["erosion"]))
    )
    outcome = '<span class="right">✓ put right</span>' if story["tail"] else '<span class="wrong">✗ not put right</span>'
    tail = f'<h3>Instead, with the picture again</h3><div class="text">{html.escape(story["tail"])}</div>' if story["tail"] else ""
    return (f'<div class="answer"><div class="facts"><strong>a wrong answer, taken up again</strong>{outcome}<span>round {story["rounds"]}</span>'
            f'<span>raised: the erosion of each step, in nats</span></div><div class="text">{steps}</div>{tail}</div>')  # fmt: skip


def group_html(group: dict) -> str:
    pictures = []
    for i, uri in enumerate(group["images"], 1):  # only what tgrl.py embeds: the page must not fetch anything
        if re.fullmatch(r"data:image/png;base64,[A-Za-z0-9+/]+=*", uri):
            pictures.append(f'<img src="{uri}" alt="picture {i} of the question">')
        else:
            pictures.append(f'<p class="soft">Picture {i} is not an embedded PNG, and not shown.</p>')
    question = html.escape(group["question"].strip()).replace("&lt;image&gt;", "<b>[picture]</b> ")
    answers = sorted(group["answers"], key=lambda answer: answer["source"] == "policy")  # experts first
    right = f"{sum(answer['reward'] == 1 for answer in answers)} of {len(answers)} answers right"
    flat = "" if any(answer["advantage"] for answer in answers) else "; all advantages are 0, so it teaches nothing"
    return f"""<article class="group"><div class="ask"><h3>Question</h3>{"".join(pictures)}<div class="text">{question}</div>
<h3>Ground truth</h3><div class="text">{html.escape(group["answer"])}</div><h3>Group</h3><div>{right}{flat}</div></div>
<div>{"".join(map(answer_html, answers))}{story_html(group["rectification"]) if "rectification" in group else ""}</div></article>"""


def write_groups(run: Run, path: Path):
    config, by_step = run.config, collections.defaultdict(list)
    for group in run.groups:
        by_step[int(group["step"])].append(group_html(group))
    digest = lambda text: f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"  # noqa: E731
    beta = f"Here β is {config['sharpness']:g}." if config["reweight"] else "In this run w is 1 for all tokens."
    filter = "" if config["filter"] else "In this run m is always 1."
    page = PAGE.format(
        # what a browser may do: run this script and use this style sheet, known by their hashes, and show embedded pictures
        policy=f"default-src 'none'; base-uri 'none'; img-src data:; script-src {digest(SCRIPT)}; style-src {digest(CSS)}",
        title=html.escape(f"{run.name}: groups from the training"),
        subtitle=html.escape(f"{config['model']} · {config['data']}"),
        expert=EXPERT.format(beta=beta, filter=filter) if config["n_off"] else NO_EXPERT,
        links="".join(f'<li><a href="#step-{step}">{step}</a></li>' for step in by_step),
        scale=SCALE if config["n_off"] else "",
        steps="".join(f'<section id="step-{step}"><h2>Step {step}</h2>{"".join(groups)}</section>' for step, groups in by_step.items()),
        css=CSS,
        script=SCRIPT,
    )
    path.write_text(page, encoding="utf-8", errors="xmlcharrefreplace", newline="\n")  # half a character becomes a reference


# ======================================================================================================================
# The command line
# ======================================================================================================================


def show(runs: list[Path]) -> None:
    """Writes curves.png and groups.html into each run; of several runs, an overlay into the folder they have in common."""
    loaded = [read_run(folder) for folder in dict.fromkeys(Path(run).resolve() for run in runs)]  # all, before anything is written
    for run in loaded:
        draw_curves([run], run.folder / "curves.png")
        write_groups(run, run.folder / "groups.html")
        print(f"wrote {os.path.relpath(run.folder / 'curves.png')} and {os.path.relpath(run.folder / 'groups.html')}")
    if len(loaded) > 1:
        overlay = Path(os.path.commonpath([run.folder.parent for run in loaded])) / "curves.png"
        draw_curves(with_unique_names(loaded), overlay)
        print(f"wrote {os.path.relpath(overlay)}")


# ======================================================================================================================
# bench
# ======================================================================================================================


SHAPES = {  # of the published models: text, and whether the head is tied to the embeddings; what is not named costs nothing
    "3B": (dict(hidden_size=2048, intermediate_size=11008, num_hidden_layers=36, num_attention_heads=16, num_key_value_heads=2, vocab_size=151936), True),
    "7B": (dict(hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28, num_key_value_heads=4, vocab_size=152064), False),
}
DEVICES = {"H100": (989e12, 3.35e12), "H200": (989e12, 4.8e12), "A100": (312e12, 2.0e12), "L40S": (362e12, 0.86e12)}  # dense bfloat16 FLOP/s, bytes/s


def build(name: str, device):
    """(model, processor): random weights of a known shape, or a real model."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    import tgrl

    processor = tgrl.toy_processor("Think first.")
    if name in ("toy", "small"):
        return tgrl.tiny_model(processor.tokenizer, *dict(toy=(128, 3, 2), small=(256, 6, 6))[name]), processor
    if name not in SHAPES:
        return tgrl.load_model(name)
    text, tied = SHAPES[name]
    vision = dict(depth=32, hidden_size=1280, intermediate_size=3420, num_heads=16, out_hidden_size=text["hidden_size"])
    tokens = {f"{kind}_token_id": processor.tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>") for kind in ("image", "video")}
    rope = dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24])
    config = Qwen2_5_VLConfig(text_config=text | dict(rope_parameters=rope), vision_config=vision, tie_word_embeddings=tied, **tokens)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in Qwen2_5_VLForConditionalGeneration(config).parameters())
    cuda = device.type == "cuda"
    free = torch.cuda.mem_get_info()[0] if cuda else os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    # weights, gradients, moments and actor; on a GPU the first three dealt out, but the weights whole while they are being made
    need = parameters * (max(2 + 16 / int(os.environ.get("WORLD_SIZE", 1)), 6) if cuda else 16)
    if need > free:
        raise BadRun(f"{name} has {parameters / 1e9:.2f} billion parameters: {need / 2**30:.0f} GiB with gradients and Adam's moments, and {free / 2**30:.0f} GiB are free here")
    with device:
        return Qwen2_5_VLForConditionalGeneration(config), processor


def bench(model: str, questions: int, answers: int, tokens: int, pixels: int, micro_batch: int, repeats: int, separate_rows: bool) -> None:
    """What a step costs: rollout, scoring and update of some questions on each process; and the update with separate rows."""
    import dataclasses
    import random
    import statistics
    import time

    import torch
    from PIL import Image

    import tgrl

    accelerator = tgrl.start_processes()
    device, world = accelerator.device, accelerator.num_processes
    cuda, rng = device.type == "cuda", random.Random(accelerator.process_index)
    cfg = tgrl.Config(**tgrl.TOY | dict(min_pixels=28 * 28, max_pixels=pixels**2, max_answer=tokens, max_prompt=10**6))
    net, processor = build(model, device)
    encoder = tgrl.Encoder(processor, net, cfg)
    encoder.unwritable = torch.tensor([net.config.image_token_id, net.config.video_token_id, *encoder.ends])  # no answer ends early
    layers, head = net.model.language_model.layers, net.lm_head.weight.numel()
    blocks, towers = (sum(p.numel() for p in part.parameters()) for part in (layers, net.model.visual.blocks))
    text, parameters = net.config.get_text_config(), sum(p.numel() for p in net.parameters())
    if model not in ("toy", "small"):
        net.activation_checkpointing_enable()
    actor = tgrl.frozen_copy(net, torch.bfloat16 if cuda else torch.float32).to(device) if cuda or world > 1 else net
    policy = tgrl.shard(tgrl.Policy(net, encoder.unwritable), accelerator)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-6)

    together = []
    for _ in range(questions):
        noise = Image.frombytes("RGB", (pixels, pixels), rng.randbytes(3 * pixels * pixels))
        problem = tgrl.read_problem({"images": [noise], "problem": "<image>What is the area?", "answer": "1"}, Path())
        ids = [[rng.randrange(10, 300) for _ in range(tokens)] for _ in range(answers)]
        together.append(tgrl.Group(problem, encoder(problem), [tgrl.Trajectory(i, "", 0.0, advantage=rng.gauss(0, 1)) for i in ids]))
    apart = [dataclasses.replace(group, trajectories=[answer]) for group in together for answer in group.trajectories]

    def rollout():
        tgrl.sample(actor, encoder, [group.prompt for group in together], answers)

    def scoring():
        tgrl.score(policy, together, micro_batch)

    def update(groups=together, size=micro_batch):
        policy.train()
        for part in tgrl.batches(groups, size):
            batch = tgrl.pack(part).to(device)
            logp = policy(batch)
            shares = tgrl.token_shares(batch.mask, "dapo", n_tokens=questions * answers * tokens)
            loss, _ = tgrl.tgrl_loss(logp, logp.detach(), batch.mask, batch.advantages, batch.is_expert, batch.expert_ok, shares,
                                     sharpness=14.0, clip_low=0.2, clip_high=0.28)  # fmt: skip
            loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    jobs = {"rollout": rollout, "scoring": scoring, "update": update}
    if separate_rows:
        jobs["separate rows"] = lambda: update(apart, micro_batch * answers)
    seconds, peaks = {name: [] for name in jobs}, {}
    for _ in range(repeats + 1):  # in turns
        for name, job in jobs.items():
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            start = time.perf_counter()
            job()
            if cuda:
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - start)
            peaks[name] = tgrl.peak_memory()
    if not accelerator.is_main_process:
        return

    kind = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    peak, bandwidth = next((numbers for name, numbers in DEVICES.items() if name in kind), (None, None))
    prompt, patches = len(together[0].prompt.ids), sum(len(g.prompt.pixels) for g in together)
    answered, row = questions * answers * tokens, questions * (prompt + answers * tokens)
    forward = {"rollout": row, "scoring": row, "update": row, "separate rows": questions * answers * (prompt + tokens)}
    print(f"{model}: {parameters / 1e9:.4g} B parameters on {world} x {kind}; on each: {questions} questions of {prompt} tokens, {answers} answers of {tokens} to each")
    print(f"median of {repeats}        seconds  answer tokens/s   TFLOP/s  of peak   peak GiB")
    for name, times in seconds.items():
        time_, passes = statistics.median(times[1:]), 6 if name in ("update", "separate rows") else 2
        pictures = patches * (answers if name == "separate rows" else 1)
        flops = passes * (blocks * forward[name] + head * answered + towers * pictures) / time_
        share, held = f"{flops / peak:8.1%}" if peak else "       –", f"{peaks[name]:8.1f}" if cuda else "       –"
        print(f"{name:16}  {time_:10.3f}  {answered / time_:15.0f}  {flops / 1e12:8.3g} {share}   {held}")
    if bandwidth:
        context = prompt + tokens / 2
        cache = 2 * text.num_hidden_layers * text.num_key_value_heads * (text.hidden_size // text.num_attention_heads) * context * questions * answers
        bound = 2 * (blocks + head + cache) * tokens / bandwidth
        print(f"rollout: {bound / statistics.median(seconds['rollout'][1:]):.0%} of what reading weights and cache once a token would allow")
    if separate_rows:
        ratio = statistics.median(seconds["update"][1:]) / statistics.median(seconds["separate rows"][1:])
        print(f"a group in one row takes {ratio:.2f} of the time of separate rows")
    print("FLOPs: 2 a weight and token forward, 6 with the backward pass; neither attention nor recomputation is counted.")


VERBS = {"show": show, "bench": bench}  # each takes what its arguments are called


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    verb = verbs.add_parser("show", help="curves and recorded groups of finished or running trainings")
    verb.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a folder that `tgrl.py train --out` wrote")
    verb = verbs.add_parser("bench", help="what a step costs here, with random weights")
    verb.add_argument("--model", default="small", help="toy, small (hidden 256, 6 + 6 blocks), 3B, 7B, or a hub id or folder; default small")
    shape = dict(questions=4, answers=8, tokens=64, pixels=448, micro_batch=4, repeats=5)
    for name, default in shape.items():
        verb.add_argument(f"--{name}", type=int, default=default, metavar="N", help=f"default {default}")
    verb.add_argument("--separate_rows", action=argparse.BooleanOptionalAction, default=True, help="also the update with a row for each answer")
    options = vars(parser.parse_args())
    try:
        VERBS[options.pop("verb")](**options)
    except (BadRun, OSError) as error:
        print(f"eval.py: {error}", file=sys.stderr)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
