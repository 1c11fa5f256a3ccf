#!/usr/bin/env python
"""How a notebook reads: minutes, the share of passive sentences, and the share that says we or you

    python tools/prose.py [NOTEBOOK …]       all of nbs by default; the last line is the sum

The rules. Minutes: 200 words of prose a minute, 5 s for a line of an exported cell, 3 s for any other line of code that
is shown. A sentence is what ends with a full stop, a question or exclamation mark or a colon before a blank line, in
markdown cells without headings, tables, code and formulas, of at least three words. It is passive if a form of "be" or
"get" comes before a participle, with at most two words between: a word in -ed, or one of `IRREGULAR`. It says we or you
if one of `PERSON` stands in it.
"""
import json
import re
import sys
from pathlib import Path

IRREGULAR = '''begun bound bought brought built chosen cut done drawn driven fed felt forgotten found given gone heard held hidden
kept known laid led left lost made meant met paid put read rewritten run said seen sent set shown shut split spent spoken
stood stolen struck swept taken taught thought thrown told understood worn written'''.split()
BE = 'am|is|are|was|were|be|been|being|get|gets|got'
PASSIVE = re.compile(rf"\b({BE})(n't)?( \w+){{0,2}}? (\w{{2,}}ed|{'|'.join(IRREGULAR)})\b", re.I)
PERSON = re.compile(r"\b(we|us|our|ours|you|your|yours|let's)\b", re.I)

def prose(cell: str) -> str:
    "The running text of a markdown cell"
    text = re.sub(r'```.*?```|\$\$.*?\$\$|<[^>]*>', ' ', cell, flags=re.S)
    lines = [line for line in text.splitlines() if not re.match(r'\s*(#|\||:::|!\[)', line)]
    text = re.sub(r'\[([^\]]*)\]\([^)]*\)', r'\1', '\n'.join(lines))
    return re.sub(r'`[^`]*`|\$[^$]*\$', 'x', text)

def sentences(text: str) -> list:
    parts = re.split(r'(?<=[.!?])["”)*]*\s+|:?\s*\n\s*\n|\n\s*[-*\d.]+ ', re.sub(r'^\s*>\s*', '', text))
    return [p.strip() for p in parts if len(p.split()) >= 3]

def figures(path: Path) -> dict:
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    text = [prose(''.join(c['source'])) for c in cells if c['cell_type'] == 'markdown']
    code = [''.join(c['source']) for c in cells if c['cell_type'] == 'code']
    exported = sum(len(c.splitlines())-1 for c in code if c.startswith('#| export'))
    shown = sum(len(c.splitlines()) for c in code if not c.startswith(('#| export', '#| hide')))
    said = [s for t in text for s in sentences(t)]
    words = sum(len(t.split()) for t in text)
    return dict(minutes=words/200+exported*5/60+shown*3/60, sentences=len(said),
                passive=sum(bool(PASSIVE.search(s)) for s in said), person=sum(bool(PERSON.search(s)) for s in said))

def line(name: str, f: dict) -> str:
    n = max(f['sentences'], 1)
    return f'{name:45}{f["minutes"]:7.0f} min{f["sentences"]:6} sentences{f["passive"]/n:6.0%} passive{f["person"]/n:6.0%} we or you'

if __name__ == '__main__':
    root = Path(__file__).parents[1]
    found = [Path(a) for a in sys.argv[1:]] or sorted(p for p in (root/'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts)
    rows = [(p.name if sys.argv[1:] else str(p.relative_to(root)), figures(p)) for p in found]
    for name, f in rows: print(line(name, f))
    print(line('all', {k: sum(f[k] for _, f in rows) for k in rows[0][1]}))
