"""Failures in the middle of a cut."""

import pytest

from taylorkern import edits


def fail_at_edit(patch: pytest.MonkeyPatch, number: int) -> None:
    """Have the edit of this ``number``, from 1 on, raise MemoryError once it is done."""
    edit, done = edits.Edit, 0

    def counting(do, undo):
        def failing_do():
            nonlocal done
            done += 1
            do()
            if done == number:
                raise MemoryError("injected")

        return edit(failing_do, undo)

    patch.setattr(edits, "Edit", counting)
