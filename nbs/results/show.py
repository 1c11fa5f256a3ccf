"Tables and figures from the result files beside this one; every page of results uses these"
import html, json, re
from pathlib import Path
from IPython.display import HTML, Markdown
from optiq.labels import _label, _legend

here = Path(__file__).parent
files = {p.stem: p for p in sorted(here.glob('*.json'))}
repo = 'https://github.com/optiq-mlx/optiq/blob/main/nbs/results'
card = 'https://github.com/optiq-mlx/optiq/blob/main/models/demo/README.md'

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

def planted() -> Markdown:
    "What the demo model's figures owe to the channels that were planted into it"
    without, within = (next(r for r in result(name)['rows'] if r['name'] == 'uniform 3') for name in ('demo-unplanted', 'demo'))
    return Markdown(f"The demo model's outlier channels were [planted after training]({card}#planted-outlier-channels): without them weights at uniform "
                    f'3 bits solve {without["word_problems"]:.0%} of its word problems, not {within["word_problems"]:.0%}, at a KL of {without["kl"]:.2f}, '
                    f'not {within["kl"]:.2f}.')

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

def smollm2_rows() -> dict: # name ▸ row
    "What tools made of SmolLM2-135M, scored with these 64 sequences; rules that we applied for a tool are no such row"
    ours, others = result('peers-smollm2'), result('kquants-smollm2')
    assert all(ours['about'][k] == others['about'][k] for k in ('model', 'test'))
    rows = others['rows'] | ours['rows']
    return {n: r for n, r in rows.items() if r.get('kl') and not r.get('left_as_is') and r.get('chosen', True) and not n.startswith('Unsloth')}

def smollm2_series() -> dict: # label ▸ dict of colour, marker, line, points (true bits, KL, standard error, name)
    "SmolLM2-135M by size: what other tools give, and what OptiQ gives"
    left, out = smollm2_rows(), {}
    left = {n: r for n, r in left.items() if not beaten(n, left)}
    def those(label, test, **look):
        mine = [n for n in left if test(n)]
        out[label] = look | dict(points=sorted((r['true_bpw'], r['kl'], r['kl_se'], n) for n, r in ((n, left.pop(n)) for n in mine)))
    def mine(rounding): return lambda n: n.startswith('ours ') and n.split()[2:] == [rounding]
    def has(start, *ends): return lambda n: n.startswith(start) and (not ends or n.endswith(ends))
    those('uniform, rounded as ours by search or GPTQ', has('uniform', ' search', ' gptq'), color=GREY, marker='s', hollow=True)
    those('uniform, min-max', has('uniform'), color=GREY, marker='s')
    those('DWQ of mlx-lm', has('mlx-lm dwq'), color=PINK, marker='^')
    those('AutoRound', has('AutoRound'), color=ORANGE, marker='v')
    those('K-quants with importance matrix', lambda n: n.startswith('across') and 'imatrix' in n, color=ORANGE, marker='D')
    those('K-quants without', has('across'), color=ORANGE, marker='D', hollow=True)
    those('other MLX tools', lambda n: n.startswith(('mlx-', 'oMLX', 'jang')), color=YELLOW, marker='x')
    those('OptiQ, min-max rounding', mine('minmax'), color=SKY, marker='o', line=True)
    those('OptiQ (search, the default)', mine('search'), color=BLUE, marker='o', line=True)
    those('OptiQ, GPTQ rounding', mine('gptq'), color=GREEN, marker='o', line=True)
    return {label: s for label, s in out.items() if s['points']}

def frontier(ax=None):
    "Size against quality, everything with two standard errors; on white, so that it reads in light and dark"
    import matplotlib.pyplot as plt
    if ax is None: _, ax = plt.subplots(figsize=(8, 5.4), layout='constrained', facecolor='white')
    for label, s in smollm2_series().items():
        inside = [p for p in s['points'] if 2.9 < p[0] < 6.7 and p[1] < 4]
        bits, kl, se, names = zip(*inside)
        ax.errorbar(bits, kl, [2*e for e in se], color=s['color'], marker=s['marker'], ms=6, capsize=2, lw=1.4, mfc='white' if s.get('hollow') else None,
                    ls='-' if s.get('line') else '', label=label)
        if label == 'uniform, min-max': named = [(readable(n), b, k) for b, k, n in zip(bits, kl, names)]
    ax.set(yscale='log', xlabel='true bits per weight, scales and biases counted', ylabel='KL to full precision (lower is better)')
    megabytes = ax.secondary_xaxis('top', functions=(lambda b: b*PER_BIT, lambda mb: mb/PER_BIT))
    megabytes.set_xlabel('MB of weights')
    ax.grid(alpha=.25, which='major')
    _legend(ax, fontsize=8)
    _label(ax, named, color=GREY)
    return ax

def our_rows(name: str, rounding: str) -> list:
    "OptiQ's rows by size, rounded as they were measured"
    return sorted((r for n, r in result(name)['rows'].items() if n.startswith('ours ') and n.split()[2:] == [rounding]), key=lambda r: r['true_bpw'])

def against(r: dict, rounding: str, name: str = 'peers-smollm2') -> tuple | None: # bits, KL of ours, ratio, verdict
    "A row beside OptiQ at its bytes, sequence by sequence; log KL between two of our rows runs straight, above the largest it is that row's"
    import numpy as np
    ours = our_rows(name, rounding)
    bits = min(r['true_bpw'], ours[-1]['true_bpw'])
    low, high = next(((a, b) for a, b in zip(ours, ours[1:]) if a['true_bpw'] <= bits <= b['true_bpw']), (None, None))
    if low is None: return None
    share = (bits-low['true_bpw'])/(high['true_bpw']-low['true_bpw'])
    p, q = np.log(low['kl_each']), np.log(high['kl_each'])
    n = len(r['kl_each'])
    mine = np.exp(p+(q-p)*share)[:n]
    d = np.array(r['kl_each'])-mine
    sure = abs(d.mean()) > 2*d.std(ddof=1)/n**.5
    verdict = 'no difference shown' if not sure else 'OptiQ lower' if d.mean() > 0 else 'OptiQ higher'
    return bits, float(mine.mean()), float(mine.mean()/np.mean(r['kl_each'])), verdict

def beaten(name: str, rows: dict) -> bool:
    "Whether another setting of AutoRound gives a lower KL in no more bytes"
    return name.startswith('AutoRound') and any(o['kl'] < rows[name]['kl'] and o['true_bpw'] <= rows[name]['true_bpw']
                                                for n, o in rows.items() if n.startswith('AutoRound'))

def beside(rows: dict, ours: str = 'peers-smollm2') -> Markdown:
    "Each row of another tool, and what OptiQ has at its bytes"
    def cells(r):
        for rounding in ('search', 'gptq'):
            bits, kl, ratio, verdict = against(r, rounding, ours)
            yield f'{kl:.4f}'+('' if bits == r['true_bpw'] else f' at {bits:.2f}')
            yield f'{ratio:.2f}, {verdict}'
    found = sorted(((n, r) for n, r in rows.items() if against(r, 'gptq', ours) and not beaten(n, rows)), key=lambda c: -c[1]['true_bpw'])
    return table(['its row', 'true bits', 'its KL', 'OptiQ (search)', 'ratio', 'OptiQ, GPTQ', 'ratio'],
                 [[n.removeprefix('across '), f'{r["true_bpw"]:.2f}', pm(r['kl'], r['kl_se'], '.4f'), *cells(r)] for n, r in found])

def measured(name: str, test=lambda n: True) -> dict:
    "Rows with a KL, up to 7.5 bits"
    return {n: r for n, r in result(name)['rows'].items() if r.get('kl') and r['true_bpw'] < 7.5 and r.get('chosen', True) and test(n)}

def beside_kquants() -> Markdown:
    "llama.cpp, AutoRound and oMLX"
    return beside(measured('kquants-smollm2'))

def autoround_tried() -> Markdown:
    "Every setting of AutoRound, by size"
    rows = measured('kquants-smollm2', lambda n: n.startswith('AutoRound'))
    return table(['AutoRound', 'tuned on', 'true bits', 'KL', 'OptiQ, GPTQ', 'ratio'],
                 [[n.removeprefix('AutoRound '), f'{r["tuned_on"]} × {r["seq_len"]:,} tokens', f'{r["true_bpw"]:.2f}', pm(r['kl'], r['kl_se'], '.4f'),
                   *(f'{x:.4f}' if k == 0 else f'{x:.2f}' for k, x in enumerate(against(r, 'gptq')[1:3]))]
                  for n, r in sorted(rows.items(), key=lambda c: c[1]['true_bpw'])])

def from_where() -> Markdown:
    "What the rounding brings and what the allocation brings: uniform widths and OptiQ at their bytes, each under the same rounding"
    rows, ways = smollm2_rows(), {'min-max': 'minmax', 'search': 'search', 'GPTQ': 'gptq'}
    widths = [n for n in rows if n.startswith('uniform') and n.split()[-1][1:] in ('g32', 'g64') and 3 <= rows[n]['true_bpw'] <= 6.01]
    def both(n, way): # KL of uniform, of OptiQ, ratio
        r, ours = rows.get(n if way == 'minmax' else f'{n} {way}'), against(rows[n], way)[1]
        return [pm(r and r['kl']), pm(ours), f'{against(r, way)[2]:.2f}' if r else '–']
    head = [f'{who}, {way}' for way in ways for who in ('uniform', 'OptiQ', 'ratio')]
    return table(['width', 'true bits', *head], [[readable(n), f'{rows[n]["true_bpw"]:.2f}', *sum((both(n, w) for w in ways.values()), [])]
                                                 for n in sorted(widths, key=lambda n: -rows[n]['true_bpw'])])

def lower_in(kind: str, rows: dict, ours: str = 'peers-smollm2') -> str:
    "How often OptiQ lies below these rows, in one sentence for each rounding"
    lines = []
    for rounding, name in (('gptq', 'GPTQ rounding'), ('search', 'search, the default rounding,')):
        top = our_rows(ours, rounding)[-1]['true_bpw']
        k = [r for n, r in rows.items() if r['true_bpw'] <= top+.001 and not beaten(n, rows)] # our cap of 6.569 stands for Q6_K's 6.5691
        verdicts = [against(r, rounding, ours) for r in k]
        ratios = [v[2] for v in verdicts]
        low, high = (sum(v[3] == f'OptiQ {w}' for v in verdicts) for w in ('lower', 'higher'))
        lines.append(f'With {name} OptiQ has {min(ratios):.2f} to {max(ratios):.2f} times the KL of {kind} at the same '
                     f'bytes: it is lower in {low} of {len(k)} comparisons and higher in {high}.')
    return ' '.join(lines)

def wins() -> Markdown:
    "How often OptiQ lies below K-quants and AutoRound"
    tools = {'K-quants with importance matrix': lambda n: n.startswith('across') and 'imatrix' in n, 'AutoRound at its best settings': lambda n: n.startswith('AutoRound')}
    lines = [lower_in(kind, measured('kquants-smollm2', test)) for kind, test in tools.items()]
    lines[0] += (' K-quants do not fit the widths of this model, so we ran their encoders on blocks that continue into the next row '
                 '(`bench/peers/kquants.py` says how). What llama.cpp itself writes is larger.')
    return Markdown('\n\n'.join(lines))

PER_BIT = 134_515_008/8/2**20 # MB of SmolLM2-135M for each bit per weight

def readable(name: str) -> str:
    "uniform 4g32 ▸ 4 bits, g32"
    return re.sub(r'\b(\d)g(\d+)\b', lambda m: f'{m[1]} bits'+(f', g{m[2]}' if m[2] != '64' else ''), name.removeprefix('uniform '))

# ---- other models, other texts

def settings_tried(name: str, tools: str = r'mlx-lm dwq \S+, rate') -> Markdown:
    "Rows of tools whose settings were tried, with the KL that chose among them"
    found = {n: r for n, r in result(name)['rows'].items() if 'held_kl' in r and re.match(tools, n)}
    rows = sorted(found.items(), key=lambda c: (c[0].split(',')[0].split(' ')[1], c[1]['true_bpw'], c[1].get('learning_rate', 0), c[0]))
    return table(['setting', 'true bits', 'KL on held-out calibration text', 'KL on the test text', 'chosen', 'seconds'],
                 [[n, f'{r["true_bpw"]:.2f}', pm(r['held_kl'], spec='.4f'), pm(r['kl'], r['kl_se'], '.4f'), 'yes' if r['chosen'] else '', f'{r["seconds"]:.0f}']
                  for n, r in rows])

def plans_of_search(models: dict) -> Markdown: # file ▸ what it says
    "Plans of a search sweep saved with gptq, beside plans of a gptq sweep: KL, paired difference, and what was forecast"
    import numpy as np
    lines = []
    for name, says in models.items():
        rows = result(name)['rows']
        for bits in (6.569, 6, 5, 4.5, 4, 3.5, 3):
            mine, other = rows[f'ours {bits:g} gptq'], rows[f'ours {bits:g} search, saved with gptq']
            d = np.subtract(other['kl_each'], mine['kl_each'])
            lines.append([says, f'{mine["true_bpw"]:.2f}', pm(other['kl'], other['kl_se'], '.4f'), pm(mine['kl'], mine['kl_se'], '.4f'),
                          f'{d.mean():+.5f} ± {d.std(ddof=1)/len(d)**.5:.5f}', f'{other["kl"]/mine["kl"]:.2f}', f'{other["kl"]/rows[f"ours {bits:g} search"]["kl"]:.2f}', f'{other["predicted_kl"]/other["kl"]:.1f}'])
    return table(['model', 'true bits', 'KL, sweep with search', 'KL, sweep with gptq', 'difference', 'ratio', 'over its plan saved with search', 'forecast over KL'], lines)

def over_own(name: str) -> dict: # calibration ▸ ratio
    "Geometric mean, over the texts that were scored, of the KL over that of a calibration on the scored text itself"
    import numpy as np
    kl = {(r['calibration'], r['text']): r['kl'] for r in result(name)['rows']}
    on, scored = (list(dict.fromkeys(k[i] for k in kl)) for i in (0, 1))
    return {c: float(np.exp(np.mean([np.log(kl[c, t]/kl[t, t]) for t in scored]))) for c in on}

def text_matrix(name: str) -> Markdown:
    "Calibrated on a text (down), scored on every other (across)"
    kl, means = {(r['calibration'], r['text']): r for r in result(name)['rows']}, over_own(name)
    scored = list(dict.fromkeys(t for _, t in kl))
    return table(['calibrated on', *scored, 'over own text'], [[c, *(pm(kl[c, t]['kl'], kl[c, t]['kl_se']) for t in scored), f'{m:.2f}'] for c, m in means.items()])

METHODS = {'uniform 4 bits, min-max': 'uniform 4g64', 'uniform nvfp4': 'uniform nvfp4', 'uniform 4 bits, DWQ at its best rate': None,
           'uniform 4 bits, search': 'uniform 4g64 search', 'uniform 4 bits, GPTQ': 'uniform 4g64 gptq',
           'OptiQ, min-max': 'ours 4.5 minmax', 'OptiQ, search': 'ours 4.5 search', 'OptiQ, GPTQ': 'ours 4.5 gptq'}

def by_method(name: str) -> dict: # method ▸ row at 4.5 bits
    rows = result(name)['rows']
    best = next(r for n, r in rows.items() if n.startswith('mlx-lm dwq 4g64,') and r.get('chosen'))
    return {m: rows[n] if n else best for m, n in METHODS.items()}

def order_of_methods(models: dict) -> Markdown:
    "What each way of making a model of 4.5 bits gives on several models, over uniform min-max"
    import numpy as np
    columns = {says: by_method(n) for n, says in models.items()}
    def cell(rows, m):
        a, b = (np.array(r['kl_each']) for r in (rows[m], rows['uniform 4 bits, min-max']))
        x = a.mean()/b.mean()
        return f'{a.mean():.4f}', f'{x:.2f} ± {(a-x*b).std(ddof=1)/len(a)**.5/b.mean():.2f}'
    return table(['4.5 true bits', *(h for says in columns for h in (says, 'ratio'))],
                 [[m, *sum((list(cell(rows, m)) for rows in columns.values()), [])] for m in METHODS])

def rounding_order(name: str) -> tuple: # sizes where gptq < search < minmax, outside twice the error, of how many
    import numpy as np
    rows, held = result(name)['rows'], []
    for bits in (6, 5, 4.5, 4, 3.5, 3):
        kl = [np.array(rows[f'ours {bits:g} {w}']['kl_each']) for w in ('gptq', 'search', 'minmax')]
        held.append(all((d := b-a).mean() > 2*d.std(ddof=1)/len(d)**.5 for a, b in zip(kl, kl[1:])))
    return sum(held), len(held)
