"""HTML for the studio's page: answers before and after, changed matrices, and the tokens at which an edit acts."""

from __future__ import annotations

import html
import re
from collections.abc import Sequence

from remend.edit import Edit
from remend.evaluation.before_after import AnswerComparison
from remend.visible_text import mark_invisible

PROMPT_KINDS = {
    "prompt": "the prompt", "paraphrase": "another phrasing", "unseen paraphrase": "another phrasing",
    "near": "near: must stay", "far": "far: must stay", "asked": "",
}  # fmt: skip


def text_html(text: str) -> str:
    """Return a text as HTML that shows it as it is, with invisible characters marked."""
    return html.escape(mark_invisible(text))


def text_markdown(text: str) -> str:
    """Return a text as Markdown that shows it as it is, in one line, with invisible characters marked."""
    one_line = html.escape(" ".join(mark_invisible(text).split()), quote=False)
    return re.sub(r"([\\`*_{}\[\]()+\-.!|~$:]|#)", r"\\\1", one_line)


def matrices_html(edit: Edit) -> str:
    """Return a bar chart of ‖ΔW‖ for each changed matrix."""
    norms = edit.norms()
    largest = max(norms.values(), default=0.0) or 1.0
    rows = [
        f'<div class="remend-row"><code>{text_html(name)}</code><span class="remend-bar" style="width:'
        f'{40 * norm / largest:.1f}%"></span><small>‖ΔW‖ = {norm:.3g}, {edit.changes[name].describe}</small></div>'
        for name, norm in norms.items()
    ]
    return f'<div class="remend-matrices">{"".join(rows)}</div>'


def tokens_html(reactions: Sequence[tuple[str, float]]) -> str:
    """Return a prompt's tokens, shaded by how strongly the edit acts at each.

    Args:
        reactions: the tokens with shares of the largest reaction (:func:`remend.apps.studio.workspace.reactions`).
    """
    if not reactions:
        return "<p>For this kind of matrix, the reaction cannot be shown by token.</p>"
    spans = [
        f'<span class="remend-token" style="--share:{share:.2f}" title="{share:.0%} of the strongest">'
        f"{text_html(text) or '·'}</span>"
        for text, share in reactions
    ]
    return f'<p class="remend-tokens">{"".join(spans)}</p>'


def answers_html(answers: Sequence[AnswerComparison], base_only: bool = False) -> str:
    """Return a table of answers before and after an edit; changed answers are bold, right and wrong ones marked.

    Args:
        answers: the answers.
        base_only: whether to show the base model's answers only.
    """
    rows = []
    for answer in answers:
        kind = PROMPT_KINDS.get(answer.kind, answer.kind)
        prompt = (f"<small>{text_html(kind)}</small><br>" if kind else "") + text_html(answer.prompt)
        before, after = (text_html(text) or "<i>nothing</i>" for text in (answer.before, answer.after))
        after = f"<b>{after}</b>" if answer.after != answer.before else after
        mark = "" if answer.ok is None else "✓" if answer.ok else "✗"
        cells = "" if base_only else f"<td>{after}</td><td class='remend-{answer.ok}'>{mark}</td>"
        rows.append(f"<tr><td>{prompt}</td><td>{before}</td>{cells}</tr>")
    head = "<th>prompt</th>" + ("<th>answer</th>" if base_only else "<th>before</th><th>after</th><th></th>")
    return f'<div class="remend-scroll"><table class="remend-table"><tr>{head}</tr>{"".join(rows)}</table></div>'


CSS = """
.remend-scroll { overflow-x: auto; }
.remend-table { width: 100%; border-collapse: collapse; }
.remend-table, .remend-table tr { border: 0 !important; }
.remend-table th, .remend-table td { text-align: left; padding: 0.35em 0.7em; border: solid #8884 !important;
  border-width: 0 0 1px !important; }
.remend-table td { overflow-wrap: break-word; }
.remend-table small { color: #888; }
@media (max-width: 600px) {
  .remend-table { font-size: 0.85em; }
  .remend-table th, .remend-table td { padding: 0.3em 0.2em; }
}
.remend-True { color: #15803d; font-weight: bold; }
.remend-False { color: #b91c1c; font-weight: bold; }
.remend-row { display: flex; flex-wrap: wrap; align-items: center; gap: 0.3em 0.8em; margin: 0.3em 0; }
.remend-row code { flex: 0 0 18em; overflow-wrap: anywhere; }
.remend-bar { height: 0.9em; background: #2b6ca3; border-radius: 3px; }
.remend-token { background: rgb(217 129 42 / calc(var(--share) * 100%)); white-space: pre-wrap; }
"""
