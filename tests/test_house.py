"How the package is built: no circles, and lines that fit"
import ast, json, subprocess, sys
from pathlib import Path

root = Path(__file__).parents[1]
sys.path.insert(0, str(root/'tools'))
from house import figures # noqa: E402

def test_imports_make_no_circle_and_run_one_way(): # import-linter sees neither the modules of a folder nor circles below one layer
    found = figures()
    assert found['circles'] == found['upward'] == []

def test_lines_of_the_package_fit():
    ruff = [Path(sys.executable).with_name('ruff'), 'check', '--select', 'E501', '--line-length', '120', '--config', 'lint.per-file-ignores={}']
    out = subprocess.run([*ruff, '--output-format', 'json', 'optiq'], cwd=root, capture_output=True, text=True)
    faults = [(Path(f['filename']), f['location']['row']) for f in json.loads(out.stdout)]
    shown = [(p.name, row) for p, row in faults if not p.read_text(encoding='utf-8').splitlines()[row-1].startswith('__all__ = ')] # nbdev's
    assert shown == []

class Calm(ast.NodeVisitor):
    "Finds what a reader has to read twice"
    work = ast.BinOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp
    def __init__(self, path): self.path, self.found = path, []
    def note(self, node, what): self.found.append(f'{self.path.relative_to(root)}:{node.lineno}: {what}')
    def computes(self, e): # `set()` names an empty thing
        calls = [n for n in ast.walk(e) if isinstance(n, ast.Call) and (n.args or n.keywords or isinstance(n.func, ast.Attribute))]
        return calls or any(isinstance(n, self.work) for n in ast.walk(e))
    def visit_Assign(self, node):
        pair = isinstance(node.targets[0], ast.Tuple) and isinstance(node.value, ast.Tuple)
        if pair and sum(map(bool, map(self.computes, node.value.elts))) > 1: self.note(node, 'two sides compute')
        self.generic_visit(node)
    def visit_IfExp(self, node):
        if any(isinstance(e, ast.IfExp) for e in (node.body, node.orelse)): self.note(node, 'a chain of conditions')
        self.condition(node)
    def condition(self, node):
        if any(isinstance(n, ast.NamedExpr) for n in ast.walk(node.test)): self.note(node, 'an assignment in a condition')
        self.generic_visit(node)
    visit_If = visit_While = condition

def test_lines_are_calm():
    found = []
    for path in sorted((root/'optiq').rglob('*.py')):
        calm = Calm(path)
        calm.visit(ast.parse(path.read_text(encoding='utf-8')))
        found += calm.found
    assert found == []

def test_what_is_not_calm_is_found():
    calm = Calm(root/'x.py')
    calm.visit(ast.parse('a, b = f(1), g(2)\nc = 1 if x else 2 if y else 3\nif (d := f(1)): pass\ne, h = set(), 1\nx, y = y, x+y'))
    assert [f.split(': ')[1] for f in calm.found] == ['two sides compute', 'a chain of conditions', 'an assignment in a condition']
