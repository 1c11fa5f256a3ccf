"""Planned changes to the code, each of them a fault: do the tests notice?

    python bench/mutants.py [WORD …] [--all] [--list]

A change replaces a piece of text that stands exactly once in the package, wherever that is. Each is made in a copy of the
package, and the few tests that should notice run against the copy: all changes take some minutes. `--all` runs every test
instead, which takes hours. WORDs pick the changes whose names hold one of them. First the tests run on the code as it is, as a test
that fails anyway notices nothing. The exit status is 1 if a change goes unnoticed, 2 if one cannot be made or the tests fail as it is.
"""
import argparse
import multiprocessing
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

root = Path(__file__).parents[1]

@dataclass(frozen=True)
class Change:
    "A fault, and who should notice it"
    name: str
    old: str # stands once in the package
    new: str
    tests: str # beginnings of names of tests, divided by blanks; with its file, as in test_wer::test_errors, where others begin so

CHANGES = [
    # formats and bytes
    Change('bytes of scales and of block floats swapped', "per_group = 2*itemsize if fmt.mode == 'affine' else 1",
           "per_group = 1 if fmt.mode == 'affine' else 2*itemsize", 'test_bytes_are_what_mlx_stores'),
    Change('the other edge of a group is exact', 'scale = xp.where(low_edge, scale, -scale)', 'scale = xp.where(low_edge, -scale, scale)',
           'test_bit_for_bit'),
    Change('config.json names another group', 'else dict(group_size=fmt.group_size,', 'else dict(group_size=32,',
           'test_is_the_predicate_that_mlx_lm_asks'),
    Change('codes packed the other way round', 'np.arange(8)*bits', 'np.arange(7, -1, -1)*bits',
           'test_codes_are_packed_as_mlx_packs_them'),
    # texts
    Change('evaluation on the calibration side of a text', "is_test(p) == (split == 'test')", "is_test(p) == (split == 'both')",
           'test_evaluation_keeps_to_its_own_side'),
    Change('evaluation tokens from the calibration side by default', "split: str = 'test', # 'all' for a file that you only evaluate on",
           "split: str = 'train', # 'all' for a file that you only evaluate on", 'test_evaluation_keeps_to_its_own_side'),
    Change('the pipeline scores on what it calibrates on', "side, held_out = ('train', 'test') if", "side, held_out = ('train', 'train') if",
           'test_evaluation_keeps_to_its_own_side'),
    Change('calibration text is looked for at whole blocks only', 'set(hashes) & set(block_hashes(tokens, 1))',
           'set(hashes) & set(block_hashes(tokens))', 'test_calibration_text_is_found_wherever_it_begins'),
    Change('calibration text may be evaluated on', 'if share > most: raise', 'if share > 10*most: raise',
           'test_calibration_text_is_found_wherever_it_begins'),
    # what a sweep measures
    Change('KL in the other direction', 'kl = _fused(xp)(z_p, z_q, p)', 'kl = _fused(xp)(z_q, z_p, xp.softmax(z_q, axis=-1))',
           'test_kl_is_of_the_reference'),
    Change('mean KL over one token less', 'return kl[:, skip:].mean(1).reshape(-1, B)', 'return (kl.sum(1)/(T-1)).reshape(-1, B)',
           'test_a_sweeps_values_are_the_mean'),
    Change('replay skips a block', 'after = b.run_block(i, reference)', 'after = b.run_block(i, reference) if i else reference',
           'test_a_sweeps_values_are_the_mean'),
    Change('an embedding that is the head is rounded in one role', 'len(embeds) if b.checkpoint.tied else 0)', '0)',
           'test_a_sweeps_values_are_the_mean'),
    Change('streams in another order than their probes', '        streams += own', '        streams = own+streams', 'test_a_sweeps_values_are_the_mean'),
    Change('a fingerprint without the dtype', "dtype=str(b.dtype).split('.')[-1], backend=b.name", 'backend=b.name',
           'test_the_dtype_is_part'),
    Change('a fingerprint without the shape of the tokens', 'seen = str(t.shape).encode()+t.tobytes()', 'seen = t.tobytes()',
           'test_the_dtype_is_part'),
    Change('the last record of a pass is dropped', 'for k, values in zip(p.keys, np.float32(kl))', 'for k, values in list(zip(p.keys, np.float32(kl)))[:-1]',
           'test_a_sweeps_values_are_the_mean'),
    Change('a pass that was cut off counts as made', 'return all(len(records.get(k, ())) == p.stop-p.start for k in p.keys)',
           'return any(k in records for k in p.keys)', 'test_a_pass_that_was_cut_off'),
    Change('ranks begin at the second pass', 'nobodys[self.ranks.rank::', 'nobodys[self.ranks.rank+1::', 'test_a_sweeps_values_are_the_mean'),
    Change('a gradient sweep without its square', '((g[u.path]*step(u, f))**2).sum()', 'abs(g[u.path]*step(u, f)).sum()', 'test_gradients_are_squared'),
    Change('a gradient sweep without its half', '.sum())/2/batch[:, skip:].size', '.sum())/batch[:, skip:].size', 'test_gradients_are_squared'),
    Change('logits that are NaN are let through', 'if bool(b.xp.isfinite(z.sum())) or', 'if True or', 'test_logits_that'),
    Change('an unknown error is NaN', 'return None if isinstance(x, float) and not isfinite(x) else x', 'return x', 'test_one_item_shows'),
    # backends
    Change('a part of a parameter is found by its shape alone', 'if (z == weight.to(z)).all(): return', 'if True: return', 'test_both_libraries_hold'),
    Change('rows are read from the top of their table', 'start+int(r[0])*width)', 'start)', 'test_rows_are_read'),
    # allocation
    Change('a cap is off by a group', 'self.limit*self.per*(1+1e-12)-self.fixed', 'self.limit*self.per*(1+1e-12)-self.fixed+32', 'test_a_cap_is_kept'),
    Change('a bound above the best plan', '.min(1).sum()-prices@p.caps', '.min(1).sum()', 'test_no_choice_is_better'),
    Change('a price where there is none', 'if fits(0.): return np.zeros(1)', 'if fits(0.): return np.ones(1)',
           'test_a_cap_is_kept'),
    Change('ties are ignored', 'groups.setdefault(key(leader.get(u.twin, u)), [])', 'groups.setdefault(u.path, [])', 'test_ties'),
    Change('protection is ignored', 'if any(w.kind in _WIDEST for w in wishes) else left', 'if False else left', 'test_protection'),
    Change('pooling the wrong way round', 'pools[-1][0].mean() > pools[-2][0].mean()', 'pools[-1][0].mean() < pools[-2][0].mean()',
           'test_isotonic'),
    Change('nominal bits by units, not by parameters', 'sum(u.bits(self.formats[u.path])*u.params for u in free)/sum(u.params for u in free)',
           'sum(u.bits(self.formats[u.path]) for u in free)/len(free)', 'test_nominal_bits_are'),
    Change('an option is dropped that is cheaper by one cap', '(costs[..., None, :] <= costs[..., :, None]).all(0)',
           '(costs[..., None, :] <= costs[..., :, None]).any(0)', 'test_two_caps_at_once test_three_caps'),
    Change('prices at which a format is bought', 'low = max([(k-k2)/(c2-c)', 'low = min([(k-k2)/(c2-c)', 'test_each_format_is_bought'),
    Change('the whole cache is read as its keys', '(c.keys.nbytes+c.values.nbytes)//', 'c.keys.nbytes//',
           'test_attention_reads test_cache_bytes_are'),
    Change('the plan that measured worst is kept', 'kept = min((x for x in tried', 'kept = max((x for x in tried',
           'test_the_plan_that_measured_best'),
    # errors of figures
    Change('a standard error with n in it', 'return float(x.mean()), float(x.std(ddof=1)/', 'return float(x.mean()), float(x.std(ddof=0)/', 'test_a_standard_error'),
    Change("a sweep's standard error with n in it", 'float(v.std(ddof=1)/np.sqrt(len(v)))', 'float(v.std()/np.sqrt(len(v)))', 'test_a_standard_error'),
    Change("a score's standard error not over the root", 'float(x.std(ddof=1)/np.sqrt(len(x)))', 'float(x.std(ddof=1)/len(x))', 'test_a_standard_error'),
    Change("a figure's standard error with n in it", 'se = float(x.std(ddof=1)/len(x)**.5)', 'se = float(x.std()/len(x)**.5)', 'test_a_standard_error'),
    Change('an unpaired error of a curve where a paired one is claimed', 'diff, se = mean_se(a-b)',
           'diff, se = mean_se(a-b)[0], (mean_se(a)[1]**2+mean_se(b)[1]**2)**.5', 'test_errors_of_differences'),
    Change('an unpaired error of plans where a paired one is claimed', 'diff, diff_se = mean_se(self.kl[name]-self.kl[self.kept])',
           'diff, diff_se = mean_se(self.kl[name])', 'test_errors_of_differences'),
    Change('an unpaired interval of models where a paired one is claimed', 't.ppf(.975, n-1)*d.std(ddof=1)/n**.5',
           't.ppf(.975, n-1)*(np.var(x, ddof=1)+np.var(y, ddof=1))**.5/n**.5', 'test_errors_of_differences'),
    Change('McNemar on all questions', 'binomtest(up, up+down)', 'binomtest(up, n)', 'test_mcnemar'),
    Change('no correction for several tests', 'min(1., v*(len(p)-i))', 'min(1., v)', 'test_holm test_a_winner'),
    Change('an interval of a share that is not Wilson’s', "len(x)).proportion_ci(method='wilson')", "len(x)).proportion_ci(method='exact')",
           'test_figures'),
    Change('a bootstrap that draws single files', 'integers(0, n, (draws, n))', 'integers(0, n, (draws, 1))', 'test_a_rates_error'),
    # evaluations
    Change('any occurrence of the number is right in GSM8K', 'return got == want', 'return want in numbers(response)', 'test_a_number_on_the_way'),
    Change('likelihood of the token itself', 'ids[:, s.start+1:s.stop+1]', 'ids[:, s.start:s.stop]', 'test_perplexity_is_that_of_transformers'),
    Change('the margin to itself', 'z[at, answer] = -np.inf', 'z[at, answer] = z[at, answer]', 'test_margin_is_right'),
    Change('an answer is looked for one token late', 'min(len(p)-1+k, longest-2)', 'min(len(p)+k, longest-2)', 'test_padding_and_caches'),
    Change('words are compared as they are written', '(_normalizer()(t) for t in (said, written))', '(t for t in (said, written))', 'test_wer::test_errors'),
    Change('a mean of rates, not the rate of all words', "_figure('wer', float(e.sum()/words)", "_figure('wer', float((e/w).mean())", 'test_rate_and_interval'),
    Change('the first letter that is named, not the last', 'decided[-1:] or _opening', 'decided[:1] or _opening', 'test_letter'),
    # rounding
    Change('search ignores how large inputs are', 'known = stats is not None and stats.count', 'known = False', 'test_search_minds'),
    Change('importance without its square', 'else (x*x).sum(0)', 'else abs(x).sum(0)', 'test_importance_is'),
    Change("the sign of GPTQ's update of what is left", 'moved = w[now]+r[:i, now].T @ errors[:i]', 'moved = w[now]-r[:i, now].T @ errors[:i]', 'test_gptq_is_the_textbooks'),
    Change("the sign of GPTQ's update within a block", 'z = z+r_k[:k] @ errors[:k]', 'z = z-r_k[:k] @ errors[:k]', 'test_gptq_is_the_textbooks'),
    Change('the sign of the second look', 'errors[now] -= moves', 'errors[now] += moves', 'test_gptq_is_the_textbooks'),
    Change('the sign of the second look within a block', 'g = g-h_k[:k] @', 'g = g+h_k[:k] @', 'test_gptq_is_the_textbooks'),
    Change('a negative rate in DWQ', 'Adam(learning_rate,', 'Adam(-learning_rate,', 'test_dwq_goes_downhill'),
    # conversion
    Change('saved weights are compared by shape', 'if not mx.array_equal(w.astype(dtype), want, equal_nan=False):', 'if w.shape != want.shape:',
           'test_a_wrong_tensor_is_found'),
    Change('fewer bytes than planned are accepted', 'if stored_bytes(saved) != plan.nbytes', 'if stored_bytes(saved) > plan.nbytes', 'test_a_saved_model_is_neither'),
    # speed
    Change('the mean per step over another denominator', 'float(extra)/(many-few)', 'float(extra)/many', 'test_a_step_takes'),
    Change('decode speed counts the warm-up', 'for _ in range(warmup): next(steps)\n    start = time.perf_counter()',
           'start = time.perf_counter()\n    for _ in range(warmup): next(steps)', 'test_decoding_is_timed'),
    Change('decode speed counts the prompt', '(new_tokens-1)/(times[-1]-times[1])', '(new_tokens-1)/(times[-1]-times[0])', 'test_decoding_is_timed'),
    Change('the run that warms up counts', 'for _ in times][1:]', 'for _ in times]', 'test_the_first_run_only'),
    Change('half the bytes of attention in the roofline', '2*2*_GROUPS*_WIDE*', '2*_GROUPS*_WIDE*', 'test_attention_reads'),
    Change('a prediction without the cache', '/1e6+self.cache+self.overhead', '/1e6+self.overhead', 'test_attention_reads'),
    Change('device and host one after the other', 'max(self.device(plan), self.host)', 'self.device(plan)+self.host', 'test_attention_reads'),
    # caches
    Change('a cache is behind by one token', 'self.read(held[0])', 'self.read(max(1, held[0]-1))', 'test_same_logits_however'),
    Change('a sliding window grows for ever', 'min(context, self.window or context)', 'context', 'test_bytes_of_a_layout'),
    Change('a window counts the whole context', 'min(context, self.window or context)', 'context', 'test_windows_are_units'),
    Change('units of one array get formats of their own', 'leader.get(u.twin, u)', 'u', 'test_twins'),
    Change('a layout of one head', '(l.held(self.context), l.heads, dim)', '(l.held(self.context), 1, dim)', 'test_bytes_of_a_layout'),
    Change('a token does not see itself', 'mx.arange(T-L, T)[:, None] >= mx.arange(T)', 'mx.arange(T-L, T)[:, None] > mx.arange(T)',
           'test_attention_equals_dense'),
    Change('values without a partner lie among the keys', 'if a is k else (a[..., :0], a)', 'if True else (a[..., :0], a)', 'test_a_ring_holds'),
    Change('key preconditioning without query statistics', 'KeyPrecondition.of(k[i], q[i])', 'KeyPrecondition.of(k[i])', 'test_keys_are_evened_out'),
    Change('a rotation is undone by itself', 'y @ beside(y)(self.matrix.T)', 'y @ beside(y)(self.matrix)', 'test_rotations_are_rotations'),
    Change('codes are half a step too long', '.sqrt(square)*(n/2)', '.sqrt(square)*(n/2-.5)', 'test_round_trip_of_the_format'),
    Change('the factor of a sketch upside down', 'math.sqrt(math.pi/2)/self.d', 'math.sqrt(2/math.pi)/self.d', 'test_no_bias'),
]

def sources() -> dict: # path in the package ▸ text
    return {p.relative_to(root/'optiq'): p.read_text(encoding='utf-8') for p in sorted((root/'optiq').rglob('*.py')) if p.name != '_modidx.py'}

def changed(c: Change, texts: dict) -> tuple: # path, new text
    "The file that a change is in, changed; raises ValueError unless the text stands there once"
    there = {p: t.count(c.old) for p, t in texts.items() if c.old in t}
    if list(there.values()) != [1]: raise ValueError(
        f'{c.name!r}: the text {c.old!r} stands {sum(there.values())} times in the package; it has to stand there once')
    path, = there
    text = texts[path].replace(c.old, c.new)
    compile(text, str(path), 'exec')
    return path, text

def mirror(folder: Path):
    "The repository, with a copy of the package in the place of the package"
    for p in root.iterdir():
        if p.name not in ('optiq', '.git'): (folder/p.name).symlink_to(p)
    def copied(source: Path, to: Path):
        to.mkdir()
        for p in source.iterdir():
            if p.is_dir() and p.name not in ('data', '__pycache__'): copied(p, to/p.name)
            elif p.suffix == '.py': shutil.copy(p, to)
            elif p.name != '__pycache__': (to/p.name).symlink_to(p)
    copied(root/'optiq', folder/'optiq')

HEAVY = ('pytest', 'hypothesis', 'numpy', 'pandas', 'scipy.stats', 'scipy.optimize', 'torch', 'transformers', 'mlx.core', 'mlx.nn', 'tqdm.auto',
         'transformers.models.auto.modeling_auto', 'transformers.models.qwen3.modeling_qwen3', 'transformers.models.llama.modeling_llama')
fork = multiprocessing.get_context('forkserver') # imports what is slow to import once, and nothing that starts threads
fork.set_forkserver_preload(list(HEAVY))

def pytest_here(folder: Path, words: list, log: Path):
    "In a process of its own: tests on the package in a folder; what they say goes to a file"
    os.environ.update(PYTHONPATH=str(folder), OPTIQ_FAST='1')
    sys.path.insert(0, str(folder))
    sys.dont_write_bytecode = True
    os.chdir(folder)
    with log.open('wb') as f:
        for stream in (1, 2): os.dup2(f.fileno(), stream)
    import pytest
    status = pytest.main(['-q', '-p', 'no:cacheprovider', '--tb=short', *words])
    sys.stdout.flush()
    os._exit(status)

def run(folder: Path, nodes: list, *options: str) -> tuple: # exit status of pytest, the tests that failed, what it said
    "Tests on the package in a folder"
    files, words = nodes_of(nodes)
    p, log = fork.Process(target=pytest_here, args=(folder, [*options, *files, *words], folder/'log')), folder/'log'
    p.start()
    p.join()
    said = log.read_text(errors='replace')
    return p.exitcode, re.findall(r'^FAILED \S+?::(\S+)', said, re.M), said

def nodes_of(nodes: list) -> tuple: # files, options
    "Beginnings of tests as pytest takes them: the files they stand in, and an expression that picks them"
    if not nodes: return ['tests'], []
    files = dict.fromkeys(f for n in nodes for f in files_of(n))
    return list(files), ['-k', ' or '.join(n.split('::')[-1] for n in nodes)]

@lru_cache
def files_of(node: str) -> tuple: # paths
    "The files with a test that begins so; raises ValueError if there is none"
    file, _, begin = node.rpartition('::')
    found = tuple(f'tests/{p.name}' for p in sorted((root/'tests').glob(f'{file or "test_*"}.py'))
                  if re.search(rf'^def {begin}', p.read_text(encoding='utf-8'), re.M))
    if not found: raise ValueError(f'no test begins with {node!r}')
    return found

def faults(c: Change, texts: dict) -> list: # of sentences
    "Why a change cannot be made or its tests cannot be run"
    found = []
    for look in (lambda: changed(c, texts), lambda: [files_of(n) for n in c.tests.split()]):
        try: look()
        except ValueError as e: found.append(str(e) if c.name in str(e) else f'{c.name!r}: {e}')
    return found

def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('words', nargs='*', metavar='WORD')
    parser.add_argument('--all', action='store_true', help='run every test for each change')
    parser.add_argument('--unchecked', action='store_true', help='do not run the tests on the code as it is')
    parser.add_argument('--list', action='store_true', help='print the changes and whether they can be made')
    args = parser.parse_args()
    os.environ.setdefault('PYTHONWARNINGS', 'ignore:resource_tracker') # of locks that a test left when its process ended
    picked, texts, survived = [c for c in CHANGES if not args.words or any(w in c.name for w in args.words)], sources(), []
    wrong = [f'error: {fault}' for c in picked for fault in faults(c, texts)]
    if args.list: print(*(f'{c.name}: {c.tests}' for c in picked), *wrong, f'{len(picked)} changes', sep='\n')
    elif wrong: print(*wrong, sep='\n', file=sys.stderr)
    if args.list or wrong: sys.exit(2 if wrong else 0)
    edits = {c: changed(c, texts) for c in picked}
    with tempfile.TemporaryDirectory() as d:
        folder = Path(d)/'mirror'
        folder.mkdir()
        mirror(folder)
        everything = [] if args.all else [t for c in picked for t in c.tests.split()]
        status, failed, said = (0, [], '') if args.unchecked else run(folder, everything)
        if status:
            print(said[-3000:], f'error: tests fail as the code is: {", ".join(failed)}', sep='\n', file=sys.stderr)
            sys.exit(2)
        for c, (path, text) in edits.items():
            start = time.time()
            (folder/'optiq'/path).write_text(text, encoding='utf-8')
            status, failed, said = run(folder, [] if args.all else c.tests.split(), '-x')
            (folder/'optiq'/path).write_text(texts[path], encoding='utf-8')
            if status not in (0, 1): sys.exit(f'{said[-3000:]}\nerror: {c.name!r}: the tests cannot be run')
            if not failed: survived.append(c.name)
            print(f'{time.time()-start:4.0f} s  {c.name}: {", ".join(failed) or "NOT NOTICED"}', flush=True)
    print(f'{len(picked)-len(survived)} of {len(picked)} changes were noticed'+''.join(f'\nnot noticed: {n}' for n in survived))
    sys.exit(bool(survived))

if __name__ == '__main__': main()
