"""Small pictures for the page, as HTML: where a change sits, and at which tokens it acts."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from remend.edit import Edit
from remend.evaluation.before_after import AnswerComparison

KINDS = {
    "prompt": "the prompt", "paraphrase": "another phrasing", "unseen paraphrase": "another phrasing",
    "near": "near: must stay", "far": "far: must stay", "asked": "",
}  # fmt: skip


def matrices(edit: Edit) -> str:
    """The changed matrices, as bars by ‖ΔW‖."""
    norms = edit.norms()
    largest = max(norms.values(), default=0.0) or 1.0
    rows = [
        f'<div class="remend-row"><code>{escape(name)}</code><span class="remend-bar" style="width:'
        f'{40 * norm / largest:.1f}%"></span><small>‖ΔW‖ = {norm:.3g}, rank {edit.changes[name].rank}</small></div>'
        for name, norm in norms.items()
    ]
    return f'<div class="remend-matrices">{"".join(rows)}</div>'


def tokens(reactions: Sequence[tuple[str, float]]) -> str:
    """A prompt's tokens, the darker the more strongly the edit acts there."""
    if not reactions:
        return "<p>Of this kind of matrix it cannot be told by tokens.</p>"
    shown = [
        f'<span class="remend-token" style="--share:{share:.2f}" title="{share:.0%} of the strongest">'
        f"{escape(text) or '·'}</span>"
        for text, share in reactions
    ]
    return f'<p class="remend-tokens">{"".join(shown)}</p>'


def answers(found: Sequence[AnswerComparison], plain: bool = False) -> str:
    """Answers before and after, as a table; what changed is bold, what is not as it should be is marked."""
    rows = []
    for one in found:
        kind = KINDS.get(one.kind, one.kind)
        prompt = (f"<small>{escape(kind)}</small><br>" if kind else "") + escape(one.prompt)
        before, now = (escape(text) or "<i>nothing</i>" for text in (one.before, one.after))
        now = f"<b>{now}</b>" if one.after != one.before else now
        mark = "" if one.ok is None else "✓" if one.ok else "✗"
        after = "" if plain else f"<td>{now}</td><td class='remend-{one.ok}'>{mark}</td>"
        rows.append(f"<tr><td>{prompt}</td><td>{before}</td>{after}</tr>")
    head = "<th>prompt</th>" + ("<th>answer</th>" if plain else "<th>before</th><th>after</th><th></th>")
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
.remend-row code { flex: 0 0 16em; overflow-wrap: anywhere; }
.remend-bar { height: 0.9em; background: #2b6ca3; border-radius: 3px; }
.remend-token { background: rgb(217 129 42 / calc(var(--share) * 100%)); white-space: pre-wrap; }
"""
