"""What the package looks like from outside, as one row of a table: `python tools/house.py [--of FOLDER] [FIGURE …]`

Nothing is imported, the modules of `optiq/` are read. With the name of a figure, what it counts is listed:

    circles       groups of modules that import each other, by imports inside functions too
    upward        imports against the layers in pyproject.toml, inside functions too
    lone-bases    classes of which the package derives exactly one
    public        names that a module defines and offers in `__all__`
    twice         public names of more than one module
    short         functions under 4 lines that are named once more in all of package, notebooks, tests and benches
    cells         exported cells with over 15 lines beside signatures, docstrings and imports; and all their lines
    lines         lines of each module, the longest first
"""
import argparse
import ast
import json
import re
import tomllib
from collections import Counter, defaultdict
from pathlib import Path

root = Path(__file__).parents[1]

def sources(folder: Path) -> dict: # module ▸ its text
    "The modules of the package, but for the index that nbdev keeps"
    found = {}
    for p in sorted((folder/'optiq').rglob('*.py')):
        parts = p.relative_to(folder/'optiq').with_suffix('').parts
        found['.'.join(parts[:-1] if parts[-1] == '__init__' else parts)] = p.read_text(encoding='utf-8')
    del found['']
    found.pop('_modidx', None)
    return found

def imported(module: str, tree, known) -> set: # of modules
    "What a module imports from the package, wherever it does"
    found = set()
    for x in ast.walk(tree):
        if isinstance(x, ast.Import): found |= {a.name for a in x.names}
        if isinstance(x, ast.ImportFrom):
            above = ['optiq', *module.split('.')][:-x.level] if x.level else []
            base = '.'.join([*above, *([x.module] if x.module else [])])
            found |= {base, *(f'{base}.{a.name}' for a in x.names)}
    return {f.removeprefix('optiq.') for f in found if f.startswith('optiq.')} & set(known)-{module}

def circles(graph: dict) -> set: # of groups of modules
    "Modules that reach each other"
    def reached(module):
        seen, todo = set(), [module]
        while todo:
            more = graph[todo.pop()]-seen
            seen |= more
            todo += more
        return seen
    far = {m: reached(m) for m in graph}
    return {tuple(sorted(n for n in far[m] if m in far[n])) for m in graph if m in far[m]}

def upward(graph: dict, folder: Path) -> list | None: # of (module, what it imports); None if there are no layers
    "Imports of a layer that stands higher, or beside"
    tools = tomllib.loads((folder/'pyproject.toml').read_text(encoding='utf-8'))['tool']
    if 'importlinter' not in tools: return None
    layers = tools['importlinter']['contracts'][0]['layers']
    rank = {name.strip(): i for i, layer in enumerate(layers) for name in layer.split('|')}
    def top(module): return module.split('.')[0]
    def wrong(a, b): return top(a) != top(b) and rank.get(top(a), len(rank)) >= rank.get(top(b), -1)
    return [(a, b) for a in graph for b in sorted(graph[a]) if wrong(a, b)]

def lone_bases(trees: dict) -> list: # of names of classes
    "Classes of the package from which it derives one other"
    classes = [x for t in trees.values() for x in t.body if isinstance(x, ast.ClassDef)]
    children = Counter(ast.unparse(b) for c in classes for b in c.bases)
    return sorted({c.name for c in classes if children[c.name] == 1})

def public(tree) -> list: # of names
    "What a module defines and offers"
    own, offered = set(), []
    for x in tree.body:
        if isinstance(x, (ast.FunctionDef, ast.ClassDef)): own.add(x.name)
        if not isinstance(x, ast.Assign): continue
        names = {n.id for t in x.targets for n in ast.walk(t) if isinstance(n, ast.Name)}
        if '__all__' in names: offered = ast.literal_eval(x.value)
        else: own |= names
    return [n for n in offered if n in own]

def functions(tree): # ▸ those that stand in a module, no hooks of Python and none that a decorator takes
    return [x for x in tree.body if isinstance(x, ast.FunctionDef) and not x.decorator_list and not x.name.startswith('__')]

def notebooks(folder: Path): # ▸ (name, source of a code cell)
    for p in sorted((folder/'nbs').rglob('*.ipynb')):
        if {'.ipynb_checkpoints', '_proc'} & {*p.parts}: continue
        for c in json.loads(p.read_text(encoding='utf-8'))['cells']:
            if c['cell_type'] == 'code': yield p.stem, ''.join(c['source'])

def short(trees: dict, folder: Path) -> list: # of (module, function)
    "Functions of up to three lines that one place uses"
    texts = [s for _, s in notebooks(folder)]
    texts += [p.read_text(encoding='utf-8') for part in ('tests', 'bench', 'tools') for p in (folder/part).rglob('*.py')]
    used = Counter(w for t in texts for line in t.splitlines() if not re.match(r' *(from|import) ', line) for w in re.findall(r'\w+', line))
    few = [(m, f) for m, t in trees.items() for f in functions(t) if f.end_lineno-f.lineno < 3]
    return [(m, f.name) for m, f in few if used[f.name] <= 2] # where it is defined, and where it is used

def bodies(source: str) -> int:
    "Lines of code that are no signature, no docstring and no import"
    rows = {i for i, line in enumerate(source.splitlines(), 1) if line.strip() and not line.lstrip().startswith('#')}
    for x in ast.walk(ast.parse(source)):
        if isinstance(x, (ast.Import, ast.ImportFrom)): rows -= {*range(x.lineno, x.end_lineno+1)}
        if not isinstance(x, ast.FunctionDef): continue
        first = x.body[0]
        rows -= {*range(min((d.lineno for d in x.decorator_list), default=x.lineno), first.lineno)}
        if isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant): rows -= {*range(first.lineno, first.end_lineno+1)}
    return len(rows)

def cells(folder: Path) -> list: # of (body, lines, notebook, what it defines)
    "Exported cells of over 15 lines, the longest first"
    found = []
    for name, source in notebooks(folder):
        many = bodies(source) if source.startswith('#| export') else 0
        what = re.search(r'^(?:def|class) (\w+)', source, re.M)
        if many > 15: found.append((many, len(source.splitlines())-1, name, what[1] if what else ''))
    return sorted(found, reverse=True)

def figures(folder: Path = root) -> dict: # name of a figure ▸ what it counts
    "Everything there is to count"
    texts = sources(folder)
    trees = {m: ast.parse(t) for m, t in texts.items()}
    graph = {m: imported(m, t, trees) for m, t in trees.items()}
    homes = defaultdict(list)
    for m, t in trees.items():
        for n in public(t): homes[n].append(m)
    lines = {m: len(t.splitlines()) for m, t in texts.items()}
    return {'circles': sorted(circles(graph)), 'upward': upward(graph, folder), 'lone-bases': lone_bases(trees),
            'public': [(m, n) for n, ms in homes.items() for m in ms], 'twice': [(n, *ms) for n, ms in homes.items() if len(ms) > 1],
            'short': short(trees, folder), 'cells': cells(folder),
            'lines': sorted(((n, m) for m, n in lines.items()), reverse=True)}

TITLES = ('circles', 'upward imports', 'bases of one class', 'public names', 'of two modules', 'short, used once',
          'long cells', 'largest module', 'lines')

def row(f: dict) -> list: # of texts
    "The figures, in the order of their titles"
    (most, largest), total = f['lines'][0], sum(n for n, _ in f['lines'])
    counts = ['–' if v is None else f'{len(v):,}' for k, v in f.items() if k != 'lines']
    return [*counts, f'{largest}, {most:,}', f'{total:,}']

if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('figures', nargs='*', metavar='FIGURE')
    parser.add_argument('--of', type=Path, default=root, help='another checkout')
    args = parser.parse_args()
    found = figures(args.of)
    for x in (x for name in args.figures for x in found[name] or ()): print(*x if isinstance(x, tuple) else [x])
    if not args.figures:
        for cells in (TITLES, ['---']*len(TITLES), row(found)): print('| '+' | '.join(cells)+' |')
