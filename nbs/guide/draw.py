"Small drawings for the guides: inline SVG in the page's own colour of text, so that they serve light and dark pages alike"
import html
from IPython.display import HTML

BLUE, ORANGE, GREEN = '#3d8fd1', '#dd7a2f', '#2a9d74' # seen on white and on black, and apart by colour-blind eyes

def drawing(width: int, height: int, label: str, *parts: str) -> HTML: # label: what a screen reader says
    "A drawing of parts"
    inside = ''.join(parts)
    return HTML(f'<div class="drawing"><svg role="img" aria-label="{html.escape(label)}" viewBox="0 0 {width} {height}" '
                f'width="{width}" style="max-width:100%;height:auto;font:14px system-ui,sans-serif">{inside}</svg></div>')

def text(x, y, s, at: str = 'middle', size: int = 14, bold: bool = False, faint: bool = False) -> str:
    style = (' font-weight="600"' if bold else '')+(' opacity=".75"' if faint else '')
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{at}" font-size="{size}" fill="currentColor"{style}>{html.escape(str(s))}</text>'

def box(x, y, w, h, fill: str = 'none', line: bool = True, opacity: float = 1, r: int = 0) -> str:
    edge = 'stroke="currentColor" stroke-width="1.2"' if line else ''
    return f'<rect x="{x:.1f}" y="{y:.1f}" width="{w:.1f}" height="{h:.1f}" rx="{r}" fill="{fill}" fill-opacity="{opacity}" {edge}/>'

def line(x1, y1, x2, y2, color: str = 'currentColor', width: float = 1.3, dash: str = '') -> str:
    dashed = f' stroke-dasharray="{dash}"' if dash else ''
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{color}" stroke-width="{width}"{dashed}/>'

def arrow(x1, y, x2, color: str = 'currentColor', width: float = 1.3) -> str:
    "From left to right"
    return (line(x1, y, x2-6, y, color, width)
            + f'<path d="M{x2-8:.1f},{y-4.5:.1f} L{x2:.1f},{y:.1f} L{x2-8:.1f},{y+4.5:.1f}Z" fill="{color}"/>')

def road(stops: list, width: int = 760) -> HTML: # of (name, what it is)
    "Boxes in a row"
    step, w = width/len(stops), width/len(stops)-26
    parts = []
    for i, (name, what) in enumerate(stops):
        x = i*step+1
        parts += [box(x, 8, w, 54, 'currentColor', opacity=.06, r=6), text(x+w/2, 31, name, bold=True), text(x+w/2, 50, what, size=12, faint=True)]
        if i < len(stops)-1: parts.append(arrow(x+w+4, 35, x+step-4))
    return drawing(width, 70, 'The road: '+', then '.join(f'{n} ({w})' for n, w in stops), *parts)

def echoes(paths: list, width: int = 760, height: int = 190) -> HTML: # of (name, block, deviation after each later block, colour)
    "How far states are from the reference, block by block, after one tensor was changed"
    n, left, base = max(b+len(d) for _, b, d, _ in paths), 50, height-38
    step, top = (width-left-120)/n, max(max(d) for _, _, d, _ in paths)
    parts = [text(left+(i+.5)*step, height-14, f'block {i}' if n <= 12 else i, size=12, faint=True) for i in range(n)]
    parts += [line(left, base, left+n*step, base)]
    for name, b, d, color in paths:
        points = [(left+(b+k+.5)*step, base-(base-24)*v/top) for k, v in enumerate(d)]
        route = ' '.join(f'{x:.1f},{y:.1f}' for x, y in [(points[0][0]-step*.5, base), *points])
        parts += [f'<polyline points="{route}" fill="none" stroke="{color}" stroke-width="2.4"/>', text(points[-1][0]+8, points[-1][1]+4, name, 'start', 12)]
    shown = '; '.join(f'{n}: {d[0]:.3f} after its own block, {d[-1]:.3f} after the last' for n, _, d, _ in paths)
    return drawing(width, height, f'Relative deviation of the states by block. {shown}', *parts)

def beside(words: list, p: list, q: list, width: int = 760) -> HTML:
    "Two distributions over the next word"
    top, left, parts = max(*p, *q), 110, []
    for i, (w, a, b) in enumerate(zip(words, p, q)):
        y = 30+i*34
        parts += [text(left-10, y+16, repr(w), 'end', 13), box(left, y, a/top*430, 11, BLUE, line=False), box(left, y+13, b/top*430, 11, ORANGE, line=False),
                  text(left+a/top*430+6, y+10, f'{a:.3f}', 'start', 12), text(left+b/top*430+6, y+23, f'{b:.3f}', 'start', 12)]
    key = [box(left, 6, 11, 11, BLUE, line=False), text(left+17, 16, 'full precision, p', 'start', 13),
           box(left+150, 6, 11, 11, ORANGE, line=False), text(left+167, 16, 'quantized, q', 'start', 13)]
    said = ', '.join(f'{w!r} {a:.3f} and {b:.3f}' for w, a, b in zip(words, p, q))
    return drawing(width, 36+34*len(words), f'Chances of the next word at full precision and quantized: {said}', *key, *parts)

def packing(steps: list, spent: float, width: int = 760, height: int = 230) -> HTML: # (bytes, KL saved, taken), best first
    "Upgrades as rectangles: as wide as their bytes, as high as the KL that a byte of them saves (log)"
    from math import log10
    total, left, base = sum(b for b, _, _ in steps), 46, height-40
    price = [k/b for b, k, _ in steps]
    low, high = log10(min(price))-.1, log10(max(price))
    x, parts = left, []
    for (b, _, taken), v in zip(steps, price):
        w, h = b/total*(width-left-10), (log10(v)-low)/(high-low)*(base-20)
        parts.append(box(x, base-h, max(w-.6, .6), h, BLUE if taken else 'currentColor', line=False, opacity=1 if taken else .22))
        x += w
    cap = left+spent/total*(width-left-10)
    parts += [line(left, base, width-10, base), line(cap, 12, cap, base+8, ORANGE, 2, '5 4'), text(cap+6, 24, 'the cap', 'start', 13),
              text(left, height-12, 'bytes of all upgrades, best first →', 'start', 12, faint=True),
              f'<g transform="translate(16,{base-10}) rotate(-90)">{text(0, 0, "KL saved per byte (log) →", "start", 12, faint=True)}</g>']
    return drawing(width, height, f'{len(steps)} upgrades ordered by KL saved per byte; the {sum(t for *_, t in steps)} that fit under the cap are taken', *parts)

def group(bits: int = 4, size: int = 64, extra=(('scale', 16), ('bias', 16)), width: int = 760) -> HTML:
    "One group of weights as it lies on disk"
    total = bits*size+sum(b for _, b in extra)
    unit, x, parts = (width-4)/total, 2., []
    for i in range(size):
        parts.append(box(x, 26, bits*unit, 34, BLUE, opacity=.75 if i % 2 else .55, line=False))
        x += bits*unit
    parts.append(text(2+bits*size*unit/2, 80, f'{size} codes of {bits} bits', size=13))
    for (name, b), color in zip(extra, (ORANGE, GREEN)):
        parts += [box(x, 26, b*unit, 34, color, line=False), text(x+b*unit/2, 80, name, size=13)]
        x += b*unit
    parts.append(text(width/2, 16, f'{total} bits for {size} weights: {bits} nominal, {total/size:g} true bits per weight', bold=True))
    return drawing(width, 90, f'A group of {size} codes of {bits} bits, then {" and ".join(n for n, _ in extra)}: {total/size:g} true bits per weight', *parts)

def before_after(a: list, b: list, grid_a: list, grid_b: list, width: int = 760, height: int = 210) -> HTML:
    "A vector before and after a rotation, with the levels that four codes would have"
    parts, half = [], width/2-20
    top = max(abs(v) for v in a)
    for x0, vector, grid, title, color in ((0, a, grid_a, 'a key, as the model makes it', ORANGE), (width/2+10, b, grid_b, 'the same, rotated', BLUE)):
        middle, scale = 112, 78/max(abs(v) for v in [*vector, *grid])
        step = half/len(vector)
        for g in grid: parts.append(line(x0, middle-g*scale, x0+half, middle-g*scale, 'currentColor', .7, '3 3'))
        parts += [box(x0+i*step, middle-max(v, 0)*scale, max(step-1, .8), max(abs(v)*scale, .6), color, line=False) for i, v in enumerate(vector)]
        parts.append(text(x0+half/2, 16, title, bold=True))
    large = sum(abs(v) > .5*top for v in a)
    return drawing(width, height, f'Left, {large} of {len(a)} channels of a key are large and the levels are far apart; right, after rotation, all channels are alike and the levels lie close', *parts)
