#!/usr/bin/env python
"""Train the demo model from data that this script makes itself, score it, and save it as a Hugging Face checkpoint.

    python models/demo/train.py --out build/demo            # one GPU, about 4 minutes on an H200
    python models/demo/train.py --out build/demo --smoke    # the whole road on a CPU in less than a minute

It needs torch, transformers, tokenizers, safetensors and numpy, and `optiq` on the path (run it from the repository root).
"""
import argparse, json, math, os, platform, sys, time
from concurrent.futures import ProcessPoolExecutor
from itertools import islice
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from optiq.formats import Format, quantize_dequantize
from optiq.material import mixture as texts_of, problems as tasks

EOS = '<|endoftext|>'
# how much the loss of a prompt's token counts, an answer's being 1: what is drawn at random cannot be learned
PROMPT_WEIGHT = dict(problem=.15, recall=.02, lists=.02, prose=1.)
T0 = time.time()
def log(*a): print(f'[{time.time()-T0:6.1f}s]', *a, flush=True)

# --- tokenizer ---------------------------------------------------------------------------------------------------

def make_tokenizer(
    seed: int,
    n: int, # documents of the mixture; the prose comes on top, all of it
    vocab: int,
) -> Tokenizer:
    "Byte-level BPE in which every digit is a token"
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"[0-9]| ?[A-Za-z_]+| ?[^\sA-Za-z_0-9]+|\n+| +(?! )| +|\s"), 'isolated'),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tok.decoder = decoders.ByteLevel()
    texts = [*islice(texts_of._training_text(seed), n), *texts_of._prose()]
    texts += [' '.join(f' {w}' for w in [*texts_of._ADJECTIVES, *texts_of._NOUNS, *tasks._NAMES])]*20 # whole words for keys and names
    tok.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=vocab, special_tokens=[EOS], initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False))
    return tok

# --- data --------------------------------------------------------------------------------------------------------

def encode(tok, docs, longest):
    "Token ids and loss weights of each document, end of text included"
    for o in docs:
        p = tok.encode(o['prompt']).ids if o['prompt'] else []
        a = tok.encode(' '*bool(p)+o['answer']).ids+[0]
        ids, w = p+a, [PROMPT_WEIGHT[o['task']]]*len(p)+[1.]*len(a)
        if len(ids) <= longest or o['task'] == 'prose': yield ids[:longest], w[:longest]

def pack(docs, length, rows, open_rows=64):
    "Fill `rows` windows with whole documents, each into the fullest open window that has room"
    out, weights, bins = [], [], []
    for ids, w in docs:
        fits = [b for b in bins if len(b[0])+len(ids) <= length]
        if fits: best = max(fits, key=lambda b: len(b[0]))
        else:
            if len(bins) == open_rows:
                full = max(range(open_rows), key=lambda i: len(bins[i][0]))
                ids0, w0 = bins.pop(full)
                out.append(ids0+[0]*(length-len(ids0))); weights.append(w0+[0.]*(length-len(w0)))
                if len(out) == rows: break
            best = ([], [])
            bins.append(best)
        best[0].extend(ids); best[1].extend(w)
    return np.array(out, dtype=np.uint16), np.array(weights, dtype=np.float16)

def make_rows(job, tok_json, length, split='train'):
    "Packed windows of `length`+1 tokens from the mixture of one seed"
    seed, rows = job
    tok = Tokenizer.from_str(tok_json)
    return pack(encode(tok, texts_of.mixture(seed, split, length), length+1), length+1, rows)

def start_data(pool, tok, seed, length, rows):
    "`rows` windows in parts, each with its own seed, made by the processes of `pool` while this one goes on"
    part = max(1, min(512, rows//16))
    jobs = [(seed*100_003+i, part) for i in range(math.ceil(rows/part))]
    return [pool.submit(make_rows, job, tok.to_str(), length) for job in jobs]

def collect(parts):
    "Ids and weights of all parts"
    return [torch.from_numpy(np.concatenate(x)) for x in zip(*[p.result() for p in parts])]

# --- model -------------------------------------------------------------------------------------------------------

def make_model(vocab, blocks, seed):
    "A random Qwen3 with all widths divisible by 128"
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=vocab, hidden_size=256, intermediate_size=512, num_hidden_layers=blocks, num_attention_heads=4,
        num_key_value_heads=2, head_dim=128, max_position_embeddings=4096, tie_word_embeddings=True, rms_norm_eps=1e-6,
        rope_parameters=dict(rope_type='default', rope_theta=ROPE_THETA), bos_token_id=None, eos_token_id=0, pad_token_id=0,
        initializer_range=.02, use_cache=True)
    model = Qwen3ForCausalLM(config)
    for block in model.model.layers:
        for linear in (block.self_attn.o_proj, block.mlp.down_proj):
            linear.weight.data /= math.sqrt(2*blocks)
    return model

ROPE_THETA = 1_000_000.

def rms(x, w, eps=1e-6): return F.rms_norm(x, (x.shape[-1],), w.to(x.dtype), eps)

def rotate(x, cos, sin): # (B, heads, T, D)
    a, b = x.chunk(2, -1)
    return (x.float()*cos+torch.cat([-b, a], -1).float()*sin).to(x.dtype)

def block_forward(x, cos, sin, n1, q, k, v, qn, kn, o, n2, gate, up, down):
    "One Qwen3 block on (B, T, C); weights are float32 and cast here, so that one compiled function serves all blocks"
    B, T, _ = x.shape
    lin = lambda x, w: F.linear(x, w.to(x.dtype))
    heads = lambda x: x.view(B, T, -1, 128).transpose(1, 2)
    h = rms(x, n1)
    Q, K, V = rotate(rms(heads(lin(h, q)), qn), cos, sin), rotate(rms(heads(lin(h, k)), kn), cos, sin), heads(lin(h, v))
    K, V = K.repeat_interleave(Q.shape[1]//K.shape[1], 1), V.repeat_interleave(Q.shape[1]//V.shape[1], 1)
    x = x+lin(F.scaled_dot_product_attention(Q, K, V, is_causal=True).transpose(1, 2).reshape(B, T, -1), o)
    h = rms(x, n2)
    return x+lin(F.silu(lin(h, gate))*lin(h, up), down)

def head_loss(x, norm, emb, targets, weights):
    "Sum of weighted losses of (B, T, C) states"
    logits = F.linear(rms(x, norm), emb.to(x.dtype)).float()
    return (F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction='none')*weights.flatten()).sum()

def weights_of(block):
    a, m = block.self_attn, block.mlp
    return [o.weight for o in (block.input_layernorm, a.q_proj, a.k_proj, a.v_proj, a.q_norm, a.k_norm, a.o_proj,
                               block.post_attention_layernorm, m.gate_proj, m.up_proj, m.down_proj)]

def rope(T, device):
    inv = 1/ROPE_THETA**(torch.arange(0, 128, 2, device=device).float()/128)
    angle = torch.outer(torch.arange(T, device=device).float(), inv)
    angle = torch.cat([angle, angle], -1)
    return angle.cos(), angle.sin()

def make_loss(model, dtype, compiled):
    "The training loss of a batch of windows, written out so that it compiles in seconds"
    blk, head = block_forward, head_loss
    if compiled: blk, head = torch.compile(blk, dynamic=False), torch.compile(head, dynamic=False)
    def loss(ids, weights): # (B, T+1)
        emb = model.model.embed_tokens.weight
        x = F.embedding(ids[:, :-1], emb).to(dtype)
        cos, sin = rope(x.shape[1], x.device)
        for layer in model.model.layers: x = blk(x, cos, sin, *weights_of(layer))
        w = weights[:, 1:].float()
        return head(x, model.model.norm.weight, emb, ids[:, 1:], w)/w.sum()
    return loss

def compiled_loss(model, args, lengths, device, dtype):
    "The compiled loss, tried at both lengths, or the plain one on a machine where torch.compile does not work"
    if device != 'cuda' or args.no_compile: return make_loss(model, dtype, False)
    try:
        loss_fn = make_loss(model, dtype, True)
        for length in lengths:
            ids = torch.zeros(max(1, args.batch_tokens//length), length+1, dtype=torch.long, device=device)
            loss_fn(ids, torch.ones_like(ids, dtype=torch.float16)).backward()
    except Exception as e:
        log('no torch.compile, going on without:', repr(e)[:300])
        loss_fn = make_loss(model, dtype, False)
    model.zero_grad(set_to_none=True)
    return loss_fn

def check_forward(model, device):
    "Our forward pass is that of transformers"
    ids = torch.randint(0, model.config.vocab_size, (2, 65), device=device)
    w = torch.ones_like(ids, dtype=torch.float32)
    with torch.no_grad():
        ours = make_loss(model, torch.float32, False)(ids, w)
        logits = model(ids[:, :-1]).logits.float()
        theirs = F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
    assert abs(ours-theirs) < 1e-3, (ours, theirs)

# --- training ----------------------------------------------------------------------------------------------------

def lr_at(progress, warmup=.02, decay=.45):
    "Warm up, hold, and fall linearly to zero"
    return min(1, progress/warmup, max(0., (1-progress)/decay))

def orthogonal(g, steps=5): # (n, rows, cols), rows >= cols
    "Each matrix with its singular values moved near 1, by the Newton-Schulz iteration of Muon (Jordan 2024)"
    x = (g.bfloat16() if g.is_cuda else g).mT
    x = x/(x.norm(dim=(1, 2), keepdim=True)+1e-7)
    for _ in range(steps):
        a = x@x.mT
        x = 3.4445*x+(-4.7750*a+2.0315*a@a)@x
    return x.mT.float()

class Muon:
    "Orthogonalized momentum for the matrices of the blocks, all matrices of one shape at once"
    def __init__(self, params, momentum=.95):
        self.momentum, self.groups = momentum, {}
        for p in params: self.groups.setdefault(tuple(sorted(p.shape)), []).append(p)
        self.state = {k: torch.zeros(len(ps), k[1], k[0], device=ps[0].device) for k, ps in self.groups.items()}

    @torch.no_grad()
    def step(self, lr):
        for k, ps in self.groups.items():
            g = torch.stack([p.grad if p.shape[0] == k[1] else p.grad.mT for p in ps])
            m = self.state[k].lerp_(g, 1-self.momentum)
            update = orthogonal(g.lerp(m, self.momentum)).unbind()
            update = [u if p.shape[0] == k[1] else u.mT for p, u in zip(ps, update)]
            torch._foreach_add_(ps, [u*max(1, u.shape[0]/u.shape[1])**.5 for u in update], alpha=-lr)

def train(model, data, loss_fn, args, device):
    "Muon and AdamW on float32 weights; the last share of the steps on long windows. Returns steps and tokens"
    muon = Muon([p for n, p in model.named_parameters() if p.ndim == 2 and 'embed' not in n])
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or 'embed' in n]
    opt = torch.optim.AdamW(rest, lr=args.lr, betas=(.9, .95), eps=1e-9, weight_decay=0., fused=device == 'cuda')
    g = torch.Generator().manual_seed(args.seed)
    orders = {}
    def batch(length): # windows in a new random order at each pass
        ids, w = data[length]
        n = max(1, args.batch_tokens//length)
        if len(orders.get(length, ())) < n: orders[length] = torch.randperm(len(ids), generator=g)
        rows, orders[length] = orders[length][:n], orders[length][n:]
        rows = rows.to(ids.device)
        return ids[rows].long(), w[rows]
    short, long = sorted(data)
    start, seen, step, progress, running = time.time(), 0, 0, 0., None
    while progress < 1:
        lr = args.lr*lr_at(progress)
        for group in opt.param_groups: group['lr'] = lr
        ids, w = batch(long if progress >= 1-args.long_share or step % 8 == 7 else short)
        loss = loss_fn(ids, w)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.)
        opt.step()
        muon.step(args.muon_lr*lr_at(progress))
        model.zero_grad(set_to_none=True)
        running = loss.detach() if running is None else .97*running+.03*loss.detach()
        step, seen = step+1, seen+ids.shape[0]*(ids.shape[1]-1)
        progress = step/args.steps
        if step % args.log_every == 0 or step in (1, 20):
            value = running.item()
            spent = time.time()-start
            log(f'step {step} loss {value:.4f} lr {lr:.1e} {seen/1e6:.0f}M tokens, {seen/spent/1e6:.2f}M/s')
            assert math.isfinite(value), 'the loss is not finite'
        if args.seconds and step % 20 == 0: # a cap on time also ends the schedule well
            progress = max(progress, (time.time()-start)/args.seconds)
    return dict(steps=step, tokens=seen, train_seconds=round(time.time()-start, 1), last_loss=round(running.item(), 4))

# --- saving ------------------------------------------------------------------------------------------------------

def save(model, tok, out):
    "A checkpoint as the hub has them, for transformers 4 and 5 and for mlx-lm"
    from safetensors.torch import save_file
    out.mkdir(parents=True, exist_ok=True)
    weights = {k: v.detach().to('cpu', torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != 'lm_head.weight'}
    save_file(weights, out/'model.safetensors', metadata=dict(format='pt'))
    c = model.config
    config = dict(architectures=['Qwen3ForCausalLM'], model_type='qwen3', vocab_size=c.vocab_size, hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size, num_hidden_layers=c.num_hidden_layers, num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads, head_dim=c.head_dim, hidden_act='silu', rms_norm_eps=c.rms_norm_eps,
        max_position_embeddings=c.max_position_embeddings, rope_theta=ROPE_THETA, rope_scaling=None, attention_bias=False,
        attention_dropout=0., use_sliding_window=False, sliding_window=None, tie_word_embeddings=True,
        initializer_range=c.initializer_range, bos_token_id=None, eos_token_id=0, pad_token_id=0, use_cache=True,
        torch_dtype='bfloat16')
    dump = lambda name, o: (out/name).write_text(json.dumps(o, indent=2)+'\n')
    dump('config.json', config)
    dump('generation_config.json', dict(eos_token_id=0, pad_token_id=0, do_sample=False))
    tok.save(str(out/'tokenizer.json'))
    dump('tokenizer_config.json', dict(tokenizer_class='PreTrainedTokenizerFast', eos_token=EOS, pad_token=EOS,
                                       model_max_length=c.max_position_embeddings, clean_up_tokenization_spaces=False))

# --- outlier channels ----------------------------------------------------------------------------------------------

@torch.no_grad()
def plant(model, strength, seed, sign=1):
    """Give the weights the spread between channels that large models grow and a model this small does not.

    Channels are scaled by powers of two on one side of a linear map and back on the other, so the function stays the same
    bit for bit: norm against the projections that read it, values against the output projection, up against down.
    How strongly is drawn anew for each block and place, as it differs between the tensors of a real model.
    A `sign` of -1 takes them out again, exactly.
    """
    r, c = torch.Generator().manual_seed(seed), model.config
    def powers(n):
        spread = strength*torch.rand((), generator=r)*2
        return 2.**(sign*torch.round(torch.randn(n, generator=r)*spread).clamp(-4, 4))
    for b in model.model.layers:
        a, m = b.self_attn, b.mlp
        for norm, readers in ((b.input_layernorm, (a.q_proj, a.k_proj, a.v_proj)), (b.post_attention_layernorm, (m.gate_proj, m.up_proj))):
            s = powers(c.hidden_size).to(norm.weight)
            norm.weight *= s
            for p in readers: p.weight /= s
        s = powers(c.intermediate_size).to(m.up_proj.weight)
        m.up_proj.weight /= s[:, None]
        m.down_proj.weight *= s
        s = powers(c.num_key_value_heads*c.head_dim).to(a.v_proj.weight)
        a.v_proj.weight /= s[:, None]
        a.o_proj.weight *= s.view(-1, 1, c.head_dim).expand(-1, c.num_attention_heads//c.num_key_value_heads, -1).flatten()

def plant_folder(folder, strength, seed, sign=1):
    "Plant outlier channels in a saved checkpoint, or take them out"
    from safetensors.torch import save_file
    path = folder/'model.safetensors'
    model = Qwen3ForCausalLM.from_pretrained(folder, dtype=torch.float32)
    plant(model, strength, seed, sign)
    save_file({k: v.to(torch.bfloat16).contiguous() for k, v in model.state_dict().items() if k != 'lm_head.weight'}, path,
              metadata={'format': 'pt'})

# --- scores ------------------------------------------------------------------------------------------------------

def wilson(k, n, z=1.96):
    "95 % interval of a share"
    p, d = k/n, 1+z*z/n
    mid, half = (p+z*z/2/n)/d, z*math.sqrt(p*(1-p)/n+z*z/4/n/n)/d
    return mid-half, mid+half

@torch.no_grad()
def agrees(model, tok, rows, batch_tokens):
    "Whether the greedy continuation of each prompt is the right answer token for token: one pass, no generation"
    pairs = [(tok(r['prompt'])['input_ids'], tok(' '+r['answer'])['input_ids']+[0]) for r in rows]
    order, out = sorted(range(len(rows)), key=lambda i: sum(map(len, pairs[i]))), {}
    size = max(1, batch_tokens//8//sum(map(len, pairs[order[-1]])))
    for at in range(0, len(order), size):
        part = order[at:at+size]
        longest = max(sum(map(len, pairs[i])) for i in part)
        x = torch.tensor([(p+a+[0]*longest)[:longest] for p, a in (pairs[i] for i in part)], device=model.device)
        best = model(x[:, :-1]).logits.argmax(-1).tolist()
        for i, b in zip(part, best):
            p, a = pairs[i]
            out[i] = b[len(p)-1:len(p)+len(a)-1] == a
    return [out[i] for i in range(len(rows))]

@torch.no_grad()
def answers(model, tok, rows, new_tokens, batch_tokens):
    "Greedy continuations of the prompts; only those that are not the right answer anyway are generated, left-padded"
    out = {i: ' '+r['answer'] for i, (r, ok) in enumerate(zip(rows, agrees(model, tok, rows, batch_tokens))) if ok}
    ids = {i: tok(r['prompt'])['input_ids'] for i, r in enumerate(rows) if i not in out}
    order = sorted(ids, key=lambda i: len(rows[i]['answer']))
    size = max(1, batch_tokens//(max(map(len, ids.values()), default=0)+new_tokens))
    for at in range(0, len(order), size):
        part = order[at:at+size]
        longest = max(len(ids[i]) for i in part)
        x = torch.tensor([[0]*(longest-len(ids[i]))+ids[i] for i in part], device=model.device)
        mask = torch.tensor([[0]*(longest-len(ids[i]))+[1]*len(ids[i]) for i in part], device=model.device)
        y = model.generate(x, attention_mask=mask, max_new_tokens=new_tokens, do_sample=False, pad_token_id=0, eos_token_id=0)
        for i, t in zip(part, y[:, longest:].tolist()): out[i] = tok.decode(t[:t.index(0)] if 0 in t else t)
    return [out[i] for i in range(len(rows))]

@torch.no_grad()
def logits_of(model, windows, batch):
    for at in range(0, len(windows), batch): yield model(windows[at:at+batch]).logits.float()

@torch.no_grad()
def kl(reference, model, windows, batch=8):
    "Mean KL(reference || model) over tokens, in nats"
    total, n = 0., 0
    for a, b in zip(logits_of(reference, windows, batch), logits_of(model, windows, batch)):
        a, b = a.log_softmax(-1), b.log_softmax(-1)
        total, n = total+(a.exp()*(a-b)).sum(-1).double().sum().item(), n+a.shape[0]*a.shape[1]
    return total/n

@torch.no_grad()
def perplexity(model, tok, texts, longest=512, batch=16):
    "Of all tokens but the first of each text"
    total, n = 0., 0
    ids = sorted((tok(text)['input_ids'][:longest]+[0] for text in texts), key=len)
    for at in range(0, len(ids), batch):
        part = ids[at:at+batch]
        x = torch.full((len(part), len(part[-1])), -100)
        for row, o in zip(x, part): row[:len(o)] = torch.tensor(o)
        x = x.to(model.device)
        logits = model(x[:, :-1].clamp(min=0)).logits.float()
        total += F.cross_entropy(logits.flatten(0, 1), x[:, 1:].flatten(), reduction='sum').item()
        n += (x[:, 1:] >= 0).sum().item()
    return math.exp(total/n)

def quantized(model, bits, group=64):
    "The model after a round trip of all Linear and Embedding weights through MLX's affine format"
    import copy
    q = copy.deepcopy(model)
    for name, p in q.named_parameters():
        if p.ndim == 2: p.data = quantize_dequantize(p.data.to(torch.bfloat16), Format(bits, group)).to(p.dtype)
    return q

def score(model, tok, args):
    "All tasks: right answers out of how many, and the perplexity of the prose"
    n = args.n_eval
    sets = dict(problems=tasks.word_problems(n*2, 'test', args.seed), unseen=tasks.word_problems(n, 'unseen', args.seed),
                lists=texts_of.lists(n, 'test', args.seed))
    rows = sum(sets.values(), [])
    texts = dict(zip(map(id, rows), answers(model, tok, rows, args.new_tokens, args.eval_tokens)))
    for length in args.lengths:
        name = f'recall {length}'
        sets[name] = texts_of.recall(args.n_recall or n, length, 'test', args.seed)
        texts |= dict(zip(map(id, sets[name]), answers(model, tok, sets[name], 8, args.eval_tokens)))
    out = {}
    for name, rows in sets.items():
        right = [tasks.correct(r, texts[id(r)]) for r in rows]
        k = sum(right)
        lo, hi = wilson(k, len(rows))
        out[name] = dict(right=k, n=len(rows), score=round(k/len(rows), 4), low=round(lo, 4), high=round(hi, 4))
        if name == 'problems': out['detail'] = [(r, texts[id(r)], ok) for r, ok in zip(rows, right)]
    out['prose perplexity'] = round(perplexity(model, tok, texts_of._prose('test')[:args.n_prose]), 3)
    return out

def table(witness):
    "The witness table in Markdown"
    names = [k for k, v in witness['bf16'].items() if isinstance(v, dict)]
    lines = ['| weights | KL | perplexity | '+' | '.join(names)+' |', '|---|'+'---:|'*(len(names)+2)]
    for width, s in witness.items():
        width = width if width == 'bf16' else f'{width} bits'
        cells = [f"{s['kl']:.4f}", f"{s['prose perplexity']:.2f}", *(f"{s[k]['score']*100:.1f}" for k in names)]
        lines.append(f'| {width} | '+' | '.join(cells)+' |')
    return '\n'.join(lines)

def make(args, lengths):
    "Data, tokenizer, training, checkpoint"
    log(f'{len(texts_of._prose())} passages of prose, {sum(map(len, texts_of._prose()))/1e6:.2f}M characters')
    tok = make_tokenizer(args.seed, 2000 if args.smoke else 15_000, args.vocab)
    log('tokenizer of', tok.get_vocab_size())
    # the processes start before CUDA does; they make the data while the model compiles
    fork = get_context('fork' if sys.platform == 'linux' else 'spawn')
    with ProcessPoolExecutor(min(15, os.cpu_count() or 1), mp_context=fork) as pool:
        parts = {n: start_data(pool, tok, args.seed+n, n, math.ceil(t/n))
                 for n, t in zip(lengths, (args.data_tokens, args.data_tokens/2))}
        device = 'cuda' if torch.cuda.is_available() else 'cpu'
        dtype = torch.bfloat16 if device == 'cuda' else torch.float32
        torch.set_float32_matmul_precision('highest')
        model = make_model(tok.get_vocab_size(), args.blocks, args.seed).to(device)
        log(f'{sum(p.numel() for p in model.parameters())/1e6:.2f}M parameters on {device}')
        check_forward(model, device)
        loss_fn = compiled_loss(model, args, lengths, device, dtype)
        log('compiled' if device == 'cuda' else 'ready')
        data = {}
        for n in lengths:
            ids, w = collect(parts[n])
            log(f'{tuple(ids.shape)} windows, {100*(w == 0).float().mean():.1f} % empty')
            data[n] = ids.to(torch.int16).to(device), w.to(device)
    result = train(model, data, loss_fn, args, device)
    data.clear()
    save(model, tok, args.out)
    log('saved', (args.out/'model.safetensors').stat().st_size, 'bytes', result)
    return result

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, required=True, help='folder for the checkpoint and scores.json')
    p.add_argument('--smoke', action='store_true', help='a few steps of a tiny run, to see that all of it works')
    p.add_argument('--seed', type=int, default=42)
    p.add_argument('--steps', type=int, default=4000)
    p.add_argument('--seconds', type=float, default=0, help='end the schedule after so long, if the steps take longer')
    p.add_argument('--lr', type=float, default=3e-3, help='of the embedding and the norms (AdamW)')
    p.add_argument('--muon_lr', type=float, default=.02, help='of the matrices of the blocks (Muon)')
    p.add_argument('--batch_tokens', type=int, default=65536)
    p.add_argument('--long_share', type=float, default=.2, help='share of steps at the end on windows of 2,048 tokens only')
    p.add_argument('--data_tokens', type=float, default=50e6, help='tokens made for the short windows; half as many for the long')
    p.add_argument('--blocks', type=int, default=10)
    p.add_argument('--vocab', type=int, default=4096)
    p.add_argument('--n_eval', type=int, default=250, help='rows of each task, twice as many word problems')
    p.add_argument('--n_recall', type=int, help='texts for each length; like n_eval')
    p.add_argument('--plant', type=float, default=0, help='strength of the outlier channels that are planted after training')
    p.add_argument('--score_only', action='store_true', help='score the checkpoint that is in the folder already')
    p.add_argument('--log_every', type=int, default=500)
    p.add_argument('--detail', action='store_true', help='also write every answer to a word problem')
    p.add_argument('--no_compile', action='store_true')
    args = p.parse_args()
    args.n_prose, args.new_tokens, args.lengths, args.eval_tokens = None, 200, (128, 256, 512, 1024, 2048), 400_000
    lengths = (512, 2048)
    if args.smoke:
        args.steps, args.batch_tokens, args.data_tokens, args.n_eval, args.log_every = 4, 1024, 2e4, 2, 2
        args.n_prose, args.new_tokens, args.lengths, args.eval_tokens = 4, 8, (128,), 4096
        lengths = (256, 512)
    device = 'cuda' if torch.cuda.is_available() else 'cpu'
    if device == 'cpu' and not args.smoke: args.eval_tokens = 60_000
    result = {} if args.score_only else make(args, lengths)
    if args.plant: plant_folder(args.out, args.plant, args.seed)
    tok = PreTrainedTokenizerFast.from_pretrained(args.out)
    model = Qwen3ForCausalLM.from_pretrained(args.out, dtype=torch.float32).to(device).eval() # what was saved
    test, _ = make_rows((args.seed, 8 if args.smoke else 64), tok.backend_tokenizer.to_str(), min(512, lengths[0]), 'test')
    windows = torch.from_numpy(test.astype(np.int64)).to(device)
    gpu = torch.cuda.get_device_name() if device == 'cuda' else platform.processor() or platform.machine()
    scores = dict(made=time.strftime('%Y-%m-%d'), hardware=gpu, python=platform.python_version(), torch=torch.__version__,
        transformers=transformers.__version__, command=' '.join(['python models/demo/train.py', *sys.argv[1:]]),
        seed=args.seed, **result)
    widths = ('bf16', 4) if args.smoke else ('bf16', 8, 4, 3, 2)
    witness = dict.fromkeys(map(str, widths))
    for width in sorted(widths, key=lambda w: (w != 'bf16', w == 8)): # the telling ones first
        m = model if width == 'bf16' else quantized(model, width)
        s = score(m, tok, args)
        s['kl'] = round(kl(model, m, windows), 5) if width != 'bf16' else 0.
        detail = s.pop('detail')
        witness[str(width)] = s
        if args.detail: # to look at what goes wrong
            (args.out/f'detail_{width}.json').write_text(json.dumps([(r['prompt'], r['answer'], t, ok) for r, t, ok in detail]))
        log(width, {k: v['score'] if isinstance(v, dict) else v for k, v in s.items()})
        (args.out/'scores.json').write_text(json.dumps(scores|dict(seconds=round(time.time()-T0), witness=witness), indent=1)+'\n')
    print(json.dumps(scores, indent=1))
    s = witness['bf16']
    for k, v in s.items():
        if isinstance(v, dict): print(f"{k:12} {v['right']:4}/{v['n']}  {v['score']*100:5.1f} %  ({v['low']*100:.1f} to {v['high']*100:.1f})")
    print(table(witness))

if __name__ == '__main__': main()
