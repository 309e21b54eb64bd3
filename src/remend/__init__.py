"""remend: change what a trained model says about one thing, and nothing else.

    >>> import remend
    >>> model, tokenizer = remend.load("atlas")
    >>> editor = remend.Mend.from_pretrained("atlas")
    >>> edit = editor.edit(model, tokenizer, [remend.EditRequest(prompt=..., target=...)])
    >>> with edit.applied(model): ...
"""
