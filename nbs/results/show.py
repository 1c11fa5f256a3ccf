"Tables and figures from the result files beside this one; every page of results uses these"
import html, json
from pathlib import Path
from IPython.display import HTML, Markdown

here = Path(__file__).parent
files = {p.stem: p for p in sorted(here.glob('*.json'))}
repo = 'https://github.com/optiq-mlx/optiq/blob/main/nbs/results'

def result(name: str) -> dict | None:
    "A result file, or None if it is not there yet"
    return json.loads(files[name].read_text(encoding='utf-8')) if name in files else None

def parts(d, path=()):
    "All parts of a result that say how they were made: (path, part)"
    if isinstance(d, dict):
        if isinstance(d.get('about'), dict): yield path, d
        for k, v in d.items():
            if k != 'about': yield from parts(v, (*path, k))

def hardware(about: dict) -> str:
    "The chip that did the work"
    gpu = about.get('gpu') or about.get('device')
    if gpu and 'cpu' not in str(gpu).lower(): return f'one {gpu}' if about.get('gpus', 1) == 1 else f'{about["gpus"]} × {gpu}'
    return f'{about.get("cores", "?")} cores of {about.get("cpu", "an unnamed CPU")}'

def commands(about: dict) -> list:
    "The command, or all of them"
    found = about.get('command', 'no command')
    return found if isinstance(found, list) else [found]

def source(name: str, *only: str) -> Markdown:
    "Where figures come from: file, machine, date, command"
    d = result(name)
    if d is None: return Markdown(f'*`{name}.json` is not there yet.*')
    lines = [f'*[{name}.json]({repo}/{name}.json)*']
    for path, part in parts(d):
        if only and not (set(path) & set(only)): continue
        a = part['about']
        lines.append('  \n'.join([f'*{a.get("date", "no date")}, {hardware(a)}, mlx {a.get("mlx", "–")}, torch {a.get("torch", "–")}*',
                                  *(f'`{c}`' for c in commands(a)), *([f'*sweep: {a["sweep"]}*'] if a.get('sweep') else [])]))
    return Markdown('\n\n'.join(dict.fromkeys(lines)))

def table(head: list, rows: list) -> Markdown:
    "A Markdown table, figures to the right"
    lines = ['| '+' | '.join(head)+' |', '|---'+'|---:'*(len(head)-1)+'|']
    return Markdown('\n'.join(lines+['| '+' | '.join(map(str, r))+' |' for r in rows]))

def pm(value, se=None, spec: str = '.3f') -> str:
    "A figure with its standard error"
    if value is None: return '–'
    return f'{value:{spec}}' if se is None else f'{value:{spec}} ± {se:{spec}}'

def catalogue() -> HTML:
    "Every result file with all its plain figures, to unfold"
    return HTML('\n'.join(filter(None, (unfold(n) for n in files))))

def unfold(name: str) -> str:
    found = list(parts(result(name)))
    if not found: return f'<p>{name}.json says nothing of how it was made.</p>'
    dates, chips = (sorted({f(p['about']) for _, p in found}) for f in (lambda a: a.get('date', 'no date'), hardware))
    body = ''.join(one_part(path, p) for path, p in found)
    return (f'<details><summary><strong>{name}</strong>, {", ".join(dates)}, {html.escape(", ".join(chips))}</summary>\n'
            f'{body}<p><a href="{repo}/{name}.json">{name}.json</a></p></details>')

def one_part(path: tuple, part: dict) -> str:
    "Command, single figures and rows of one part"
    title = f'<p><strong>{" ".join(path)}</strong></p>' if path else ''
    single = ', '.join(f'{k} {plain(v)}' for k, v in part.items() if isinstance(v, (int, float, str)) and k not in ('optiq', 'text'))
    rows = part.get('rows') or part.get('points') or part.get('steps') or []
    if isinstance(rows, dict): rows = [dict(name=k, **v) for k, v in rows.items() if isinstance(v, dict)]
    return (f'{title}<p>{"<br>".join(f"<code>{html.escape(c)}</code>" for c in commands(part["about"]))}</p>'
            f'<p>{html.escape(single)}</p>{all_columns(rows)}')

def all_columns(rows: list) -> str:
    "Rows with every plain column; a column of standard errors joins its figure"
    rows = [r for r in rows if isinstance(r, dict)]
    keys = [k for k in dict.fromkeys(k for r in rows for k in r) if any(isinstance(r.get(k), (int, float, str)) for r in rows)]
    keys = [k for k in keys if not (k.endswith('_se') and k[:-3] in keys)]
    if not keys: return ''
    cell = lambda r, k: plain(r.get(k))+(f' ± {plain(r[k+"_se"])}' if isinstance(r.get(k+'_se'), (int, float)) else '')
    head = ''.join(f'<th>{html.escape(k.replace("_", " "))}</th>' for k in keys)
    body = ''.join('<tr>'+''.join(f'<td>{html.escape(cell(r, k))}</td>' for k in keys)+'</tr>' for r in rows)
    return f'<div class="table-responsive"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'

def plain(v) -> str:
    if v is None or isinstance(v, (dict, list)): return '–'
    return f'{v:.4g}' if isinstance(v, float) else str(v)

# ---- the figure of the front page

BLUE, ORANGE, GREEN, GREY, PINK, YELLOW, SKY = '#0072B2', '#D55E00', '#009E73', '#666666', '#CC79A7', '#B8860B', '#56B4E9' # told apart by colour-blind eyes

def smollm2_series() -> dict: # label ▸ dict of colour, marker, line, points (true bits, KL, standard error, name)
    "SmolLM2-135M by size: what other tools give, and what OptiQ gives; one text, one file"
    rows = {n: r for n, r in result('peers-smollm2')['rows'].items() if r.get('kl') and not r.get('left_as_is')}
    def those(test, **look): return look | dict(points=sorted((r['true_bpw'], r['kl'], r['kl_se'], n) for n, r in rows.items() if test(n)))
    ours = lambda rounding: lambda n: n.startswith('ours') and n.endswith(rounding)
    recipe = lambda n: n.startswith('mlx-lm mixed')
    return {
        'uniform': those(lambda n: n.startswith('uniform'), color=GREY, marker='s'),
        "mlx-lm's recipes": those(recipe, color=ORANGE, marker='D'),
        "mlx-lm's tuned (GPTQ, AWQ, DWQ, dynamic)": those(lambda n: n.startswith('mlx-lm ') and not recipe(n), color=PINK, marker='^'),
        'mlx-optiq': those(lambda n: n.startswith('mlx-optiq'), color=YELLOW, marker='v'),
        'OptiQ, min-max rounding': those(ours('minmax'), color=SKY, marker='o', line=True),
        'OptiQ (search, the default)': those(ours('search'), color=BLUE, marker='o', line=True),
        'OptiQ, GPTQ rounding': those(ours('gptq'), color=GREEN, marker='o', line=True)}

def frontier(ax=None):
    "Size against quality, everything with two standard errors"
    import matplotlib.pyplot as plt
    if ax is None: _, ax = plt.subplots(figsize=(8, 4.6), layout='constrained')
    for label, s in smollm2_series().items():
        inside = [p for p in s['points'] if 2.9 < p[0] < 6.7 and p[1] < 4]
        bits, kl, se, names = zip(*inside)
        ax.errorbar(bits, kl, [2*e for e in se], color=s['color'], marker=s['marker'], ms=6, capsize=2, lw=1.4,
                    ls='-' if s.get('line') else '', label=label)
        if label == 'uniform':
            for b, k, n in zip(bits, kl, names):
                place = dict(xytext=(0, 7), ha='center') if 'bits' in readable(n) else dict(xytext=(8, -3), ha='left')
                ax.annotate(readable(n), (b, k), textcoords='offset points', fontsize=8, color=s['color'], **place)
    ax.set(yscale='log', xlabel='true bits per weight, scales and biases counted', ylabel='KL to full precision (lower is better)')
    megabytes = ax.secondary_xaxis('top', functions=(lambda b: b*PER_BIT, lambda mb: mb/PER_BIT))
    megabytes.set_xlabel('MB of weights')
    ax.grid(alpha=.25, which='major')
    ax.legend(frameon=False, fontsize=9)
    return ax

PER_BIT = 134_515_008/8/2**20 # MB of SmolLM2-135M for each bit per weight

def readable(name: str) -> str:
    "uniform 4g32 ▸ 4 bits, g32"
    bits, _, group = name.removeprefix('uniform ').partition('g')
    return f'{bits} bits'+('' if group == '64' else f', g{group}') if group else bits
