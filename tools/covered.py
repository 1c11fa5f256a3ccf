"""Which texts of a figure are covered by marks or by other texts, measured in what matplotlib's renderer draws

`tools/notebooks.py` looks at every figure that a notebook shows, and `tests/test_labels.py` at what each drawing function
makes. A text may cross a line, or stand in a cell of a heat map. It may not touch a marker, a dot, a bar or a bar of errors. Which of the
small ticks of a log axis get a label is matplotlib's choice; we leave them out.
"""
from itertools import combinations

import numpy as np
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection, PathCollection
from matplotlib.legend import Legend
from matplotlib.patches import FancyArrowPatch, Patch
from matplotlib.text import Text

NOT_DRAWN = 'None', 'none', ' ', '', None

def texts_of(fig) -> list: # of Text that a reader sees
    found = [*fig.texts, fig._suptitle, *(t for legend in fig.legends for t in legend.get_texts())]
    for ax in fig.axes:
        if not (ax.get_visible() and ax.axison): continue
        ticks = [t for axis in (ax.xaxis, ax.yaxis) if axis.get_visible() for t in axis._update_ticks() if t in axis.majorTicks]
        labels = [t for tick in ticks for t in (tick.label1, tick.label2)]+[ax.xaxis.label, ax.yaxis.label]
        found += [*ax.texts, ax.title, *labels, *(ax.get_legend().get_texts() if ax.get_legend() else ())]
    return [t for t in dict.fromkeys(found) if t is not None and t.get_visible() and t.get_text().strip()]

def is_mark(artist, axes: list) -> bool:
    "Whether an artist is a mark that no text may touch"
    if isinstance(artist, (LineCollection, PathCollection)): return True
    if isinstance(artist, Patch): return not isinstance(artist, FancyArrowPatch) and any(artist in ax.patches for ax in axes)
    return any(artist in ax.lines for ax in axes) and artist.get_marker() not in NOT_DRAWN

def drawn_marks(fig) -> np.ndarray: # (height, width) whether a mark covers this pixel, from the top
    "The marks alone, drawn where they stand in the whole figure"
    before, axes, engine, legends = fig.canvas, fig.axes, fig.get_layout_engine(), fig.findobj(Legend)
    canvas = FigureCanvasAgg(fig)
    parts = {a for legend in legends for a in legend.findobj()} | {a for ax in axes for axis in ax.findobj(Axis) for a in axis.findobj()}
    keep = [a for a in fig.findobj() if a not in parts and is_mark(a, axes)]
    groups = {fig, *axes} | {part for a in keep for part in a.findobj()}
    hidden = [a for a in fig.findobj() if a.get_visible() and a not in groups]
    styles = [(a, a.get_linestyle()) for a in keep if hasattr(a, 'get_marker')]
    fig.set_layout_engine('none') # all stays where it is
    try:
        for a in hidden: a.set_visible(False)
        for a, _ in styles: a.set_linestyle('None')
        canvas.draw()
        return np.asarray(canvas.buffer_rgba())[..., 3] > 0
    finally:
        for a in hidden: a.set_visible(True)
        for a, style in styles: a.set_linestyle(style)
        if engine is not None: fig.set_layout_engine(engine)
        fig.set_canvas(before)

def covered(fig) -> list: # of str, one for each text that something covers
    "What covers a text in this figure"
    fig.draw_without_rendering()
    boxes = [(t, Text.get_window_extent(t).padded(-1)) for t in texts_of(fig)]
    found = [f'{a.get_text()!r} and {b.get_text()!r} overlap' for (a, x), (b, y) in combinations(boxes, 2) if x.overlaps(y)]
    marks = drawn_marks(fig)
    height, width = marks.shape
    for t, box in boxes:
        x0, y0, x1, y1 = np.clip(np.round(box.extents), 0, [width, height]*2).astype(int)
        if marks[height-y1:height-y0, x0:x1].any(): found.append(f'{t.get_text()!r} is covered by a mark')
    return found
