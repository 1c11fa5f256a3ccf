#!/usr/bin/env python
"""Train the witness, a small Qwen3-VL, on diagrams that the project draws itself; score it and save it as a checkpoint.

    python models/witness/train.py --out build/witness --minutes 7     # one H100
    python models/witness/train.py --out build/witness --smoke         # the whole road on a CPU

It needs torch, tokenizers, safetensors, numpy and pillow, and `optiq` on the path (run it from the repository root).
The forward pass below is Qwen3-VL's for images of one fixed size: a batch is one tensor, where transformers goes through
the images one by one. tests/test_vlm.py holds both against each other.
"""
import argparse, json, os, platform, random, signal, sys, tempfile, threading, time
from multiprocessing import get_context
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))
os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from optiq.material import diagrams as D
from optiq.material.configs import _END, _SPECIAL, hub_config
from optiq.material.tiny import _TEMPLATE

T0 = time.time()
def log(*a): print(f'[{time.time()-T0:6.1f}s]', *a, flush=True)

# --- what the model is -------------------------------------------------------------------------------------------

LM = dict(hidden_size=256, intermediate_size=768, num_hidden_layers=6, num_attention_heads=6, num_key_value_heads=2, head_dim=64,
          rope_theta=10000, rope_scaling=dict(mrope_section=[12, 10, 10]))
EYE = dict(hidden_size=192, intermediate_size=768, depth=6, num_heads=6, out_hidden_size=256, num_position_embeddings=100,
           deepstack_visual_indexes=[1, 3])
SMOKE = dict(text_config=dict(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2),
             vision_config=dict(hidden_size=64, intermediate_size=128, depth=2, num_heads=2, out_hidden_size=64,
                                deepstack_visual_indexes=[0]))
SIDE = D._SIZE//16 # patches in a row
TOKENS = SIDE*SIDE//4 # of an image
HEAD = '<|im_start|>user\n<|vision_start|>'
IMAGES = dict(image_processor_type='Qwen2VLImageProcessorFast', processor_class='Qwen3VLProcessor', patch_size=16,
              size=dict(shortest_edge=D._SIZE**2, longest_edge=D._SIZE**2), temporal_patch_size=2, merge_size=2,
              image_mean=[.5]*3, image_std=[.5]*3)

def chat(question, answer=''):
    "One turn as the chat template writes it, with the image's tokens in place"
    image = '<|image_pad|>'*TOKENS
    return f'{HEAD}{image}<|vision_end|>{question}<|im_end|>\n<|im_start|>assistant\n' + (answer and f'{answer}<|im_end|>')

def tasks_of(r, d):
    "What is asked about one training diagram: to describe it, one free answer, two letters"
    out = [('Describe this image.', d.describe())]
    while len(out) < 4:
        q = D._ask(r, d, r.choice(D._KINDS))
        if not q: continue
        if len(out) == 1: out.append((q['question']+'\nAnswer in a word.', q['options'][q['answer']]))
        else: out.append((D.prompt(q), 'ABCD'[q['answer']]))
    return out

def make_tokenizer(out):
    "Byte-level BPE whose words are those of the diagrams"
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    r = random.Random('tokenizer')
    texts = [' '.join(f' {c}' for c in D._LETTERS)]*50
    texts += [f'{q}\n{a}' for _ in range(600) for q, a in tasks_of(r, D._diagram(r))] + ['user\nassistant\n']*50
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer, tok.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tok.train_from_iterator(texts, trainers.BpeTrainer(vocab_size=512, special_tokens=_SPECIAL, show_progress=False,
                                                       initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tok.save(str(out/'tokenizer.json'))
    return tok

# --- data --------------------------------------------------------------------------------------------------------

def rows(tok, turns, length):
    "Token ids (n, length), and where each answer starts and ends"
    ids, spans = np.zeros((len(turns), length), np.int16), np.zeros((len(turns), 2), np.int16)
    whole = tok.encode_batch([chat(q, a) for q, a in turns])
    asked = tok.encode_batch([chat(q) for q, _ in turns])
    for i, (w, p) in enumerate(zip(whole, asked)):
        if len(w.ids) > length: raise ValueError(f'{len(w.ids)} tokens: {turns[i]}')
        ids[i, :len(w.ids)], spans[i] = w.ids, (len(p.ids), len(w.ids))
    return ids, spans

def pixels(d): return np.asarray(d.draw())

CELLS = D._GRID**2 # of 32 × 32 pixels: as many as the image has tokens
FACTS = len(D._LETTERS)+len(D._COLOURS)+len(D._SHAPES)+1+2*CELLS+2*len(D._LETTERS)

def facts(d):
    "(CELLS, FACTS) of 0 and 1: label, colour, shape, anything there; where its arrows lead and come from, by place and by label"
    at, out = {n.label: n.cell[1]*D._GRID+n.cell[0] for n in d.nodes}, np.zeros((CELLS, FACTS), np.uint8)
    starts = np.cumsum([0, len(D._LETTERS), len(D._COLOURS), len(D._SHAPES), 1, CELLS, CELLS, len(D._LETTERS)])
    for n in d.nodes:
        what = D._LETTERS.index(n.label), list(D._COLOURS).index(n.colour), D._SHAPES.index(n.shape), 0
        out[at[n.label], starts[:4]+what] = 1
    for a, b in d.arrows:
        out[at[a], [starts[4]+at[b], starts[6]+D._LETTERS.index(b)]] = 1
        out[at[b], [starts[5]+at[a], starts[7]+D._LETTERS.index(a)]] = 1
    return out

def worker(k, tok_json, length, n, folder, queue):
    "Draw chunks of n training diagrams without end"
    from tokenizers import Tokenizer
    tok, r, i = Tokenizer.from_str(tok_json), random.Random(f'witness {k}'), 0
    while True:
        drawn, turns, known = [], [], []
        while len(drawn) < n:
            d = D._diagram(r)
            if D._fits(d, 'train'): drawn.append(pixels(d)); known.append(facts(d)); turns += tasks_of(r, d)
        path = f'{folder}/{k}-{i}'
        np.stack(drawn).tofile(path)
        ids, spans = rows(tok, turns, length)
        queue.put((path, ids.reshape(n, 4, -1), spans.reshape(n, 4, 2), np.stack(known)))
        i += 1

class Store:
    "The last `room` diagrams that the workers drew, on the device; a thread takes them over"
    def __init__(self, room, chunk, length, device, queue):
        self.room, self.chunk, self.device, self.queue, self.seen = room, chunk, device, queue, 0
        self.images = torch.empty((room, D._SIZE, D._SIZE, 3), dtype=torch.uint8, device=device)
        self.ids = torch.empty((room, 4, length), dtype=torch.int16, device=device)
        self.spans = torch.empty((room, 4, 2), dtype=torch.int16, device=device)
        self.known = torch.empty((room, CELLS, FACTS), dtype=torch.uint8, device=device)
        threading.Thread(target=self.fill, daemon=True).start()
    def fill(self):
        stream = torch.cuda.Stream() if self.device == 'cuda' else None
        while True:
            path, ids, spans, known = self.queue.get()
            images = np.fromfile(path, np.uint8).reshape(-1, D._SIZE, D._SIZE, 3)
            os.remove(path)
            at = self.seen%self.room
            with torch.cuda.stream(stream):
                for own, new in zip((self.images, self.ids, self.spans, self.known), (images, ids, spans, known)):
                    own[at:at+self.chunk].copy_(torch.from_numpy(new))
                if stream: stream.synchronize()
            self.seen += self.chunk
    def batch(self, n):
        "n of them at random, none of those that are being written over"
        whole, margin = self.seen, 16*self.chunk
        oldest = max(0, whole-self.room+margin)
        i = torch.randint(oldest, whole, (n,), device=self.device)%self.room
        return self.images[i], self.ids[i].long(), self.spans[i].long(), self.known[i]

# --- Qwen3-VL for images of one size ------------------------------------------------------------------------------

def rotate(x, cos, sin):
    a, b = x.chunk(2, -1)
    return x*cos + torch.cat((-b, a), -1)*sin

class Norm(nn.Module):
    def __init__(self, n): super().__init__(); self.weight = nn.Parameter(torch.ones(n))
    def forward(self, x): return F.rms_norm(x.float(), x.shape[-1:], self.weight, 1e-6)

class Part(nn.Module):
    "A module of named children"
    def __init__(self, **children):
        super().__init__()
        for name, child in children.items(): setattr(self, name, child)

class EyeBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        n, self.heads = c['hidden_size'], c['num_heads']
        self.norm1, self.norm2 = nn.LayerNorm(n, eps=1e-6), nn.LayerNorm(n, eps=1e-6)
        self.attn = Part(qkv=nn.Linear(n, 3*n), proj=nn.Linear(n, n))
        self.mlp = Part(linear_fc1=nn.Linear(n, c['intermediate_size']), linear_fc2=nn.Linear(c['intermediate_size'], n))
    def forward(self, x, cos, sin): # (B, patches, n)
        B, N, C = x.shape
        q, k, v = self.attn.qkv(self.norm1(x)).view(B, N, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k = rotate(q.float(), cos, sin).to(v.dtype), rotate(k.float(), cos, sin).to(v.dtype)
        x = x + self.attn.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(B, N, C))
        return x + self.mlp.linear_fc2(F.gelu(self.mlp.linear_fc1(self.norm2(x)), approximate='tanh'))

class Merger(nn.Module):
    def __init__(self, c, shuffled):
        super().__init__()
        self.wide, self.shuffled = 4*c['hidden_size'], shuffled
        self.norm = nn.LayerNorm(self.wide if shuffled else c['hidden_size'], eps=1e-6)
        self.linear_fc1, self.linear_fc2 = nn.Linear(self.wide, self.wide), nn.Linear(self.wide, c['out_hidden_size'])
    def forward(self, x): # (B, patches, n) ▸ (B, patches/4, out)
        x = self.norm(x.reshape(len(x), -1, self.wide) if self.shuffled else x).reshape(len(x), -1, self.wide)
        return self.linear_fc2(F.gelu(self.linear_fc1(x)))

class Eye(nn.Module):
    def __init__(self, c):
        super().__init__()
        n = c['hidden_size']
        self.patch_embed = Part(proj=nn.Conv3d(3, n, (2, 16, 16), (2, 16, 16)))
        self.pos_embed = nn.Embedding(c['num_position_embeddings'], n)
        self.blocks = nn.ModuleList(EyeBlock(c) for _ in range(c['depth']))
        self.merger = Merger(c, False)
        self.at = c['deepstack_visual_indexes']
        self.deepstack_merger_list = nn.ModuleList(Merger(c, True) for _ in self.at)
        y, x = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing='ij')
        def order(t): return t.view(SIDE//2, 2, SIDE//2, 2).transpose(1, 2).reshape(-1)
        at = torch.stack([order(y), order(x)], -1).float() # (patches, 2)
        half = n//c['num_heads']//2
        angles = (at[:, :, None]/10000**(torch.arange(0, half, 2)/half)).flatten(1)
        angles = torch.cat([angles, angles], -1)
        self.register_buffer('cos', angles.cos(), False), self.register_buffer('sin', angles.sin(), False)
        self.register_buffer('order', order(y*SIDE+x), False)
    def forward(self, images): # (B, 160, 160, 3) uint8
        x = (images.permute(0, 3, 1, 2).float()/127.5-1).view(-1, 3, SIDE//2, 2, 16, SIDE//2, 2, 16)
        x = x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(len(images), SIDE*SIDE, 768)
        w = self.patch_embed.proj.weight.sum(2).flatten(1) # both frames are the same picture
        x = F.linear(x, w, self.patch_embed.proj.bias) + self.pos_embed(self.order)
        deep = []
        for i, block in enumerate(self.blocks):
            x = block(x, self.cos, self.sin)
            if i in self.at: deep.append(self.deepstack_merger_list[self.at.index(i)](x))
        return self.merger(x), deep

class Block(nn.Module):
    def __init__(self, c):
        super().__init__()
        n, h, kv, self.d = c['hidden_size'], c['num_attention_heads'], c['num_key_value_heads'], c['head_dim']
        self.input_layernorm, self.post_attention_layernorm = Norm(n), Norm(n)
        def linear(i, o): return nn.Linear(i, o, bias=False)
        self.self_attn = Part(q_proj=linear(n, h*self.d), k_proj=linear(n, kv*self.d), v_proj=linear(n, kv*self.d),
                              o_proj=linear(h*self.d, n), q_norm=Norm(self.d), k_norm=Norm(self.d))
        m = c['intermediate_size']
        self.mlp = Part(gate_proj=linear(n, m), up_proj=linear(n, m), down_proj=linear(m, n))
    def forward(self, x, cos, sin): # (B, L, n)
        a, (B, L, _), y = self.self_attn, x.shape, self.input_layernorm(x)
        q, k, v = (f(y).view(B, L, -1, self.d) for f in (a.q_proj, a.k_proj, a.v_proj))
        q, k = rotate(a.q_norm(q).transpose(1, 2), cos, sin), rotate(a.k_norm(k).transpose(1, 2), cos, sin)
        v = v.transpose(1, 2)
        k, v = (t.repeat_interleave(q.shape[1]//t.shape[1], 1) for t in (k, v))
        o = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v, is_causal=True)
        x = x + a.o_proj(o.transpose(1, 2).reshape(B, L, -1))
        y = self.post_attention_layernorm(x)
        return x + self.mlp.down_proj(F.silu(self.mlp.gate_proj(y))*self.mlp.up_proj(y))

class Speaker(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.embed_tokens = nn.Embedding(c['vocab_size'], c['hidden_size'])
        self.layers = nn.ModuleList(Block(c) for _ in range(c['num_hidden_layers']))
        self.norm = Norm(c['hidden_size'])
        self.freq = 1/c['rope_theta']**(torch.arange(0, c['head_dim'], 2)/c['head_dim'])
        self.sections = c['rope_scaling']['mrope_section']
    def angles(self, first, L, device):
        "cos and sin of M-RoPE for an image that starts at token `first`"
        t = torch.arange(L)
        p = torch.stack([t]*3)
        image = torch.arange(TOKENS)
        p[:, first:first+TOKENS] = first + torch.stack([image*0, image//(SIDE//2), image%(SIDE//2)])
        p[:, first+TOKENS:] = first + SIDE//2 + torch.arange(L-first-TOKENS)
        f = p[:, :, None]*self.freq # (3, L, d/2)
        for i in (1, 2): f[0][:, i:3*self.sections[i]:3] = f[i][:, i:3*self.sections[i]:3]
        f = torch.cat([f[0], f[0]], -1).to(device)
        return f.cos(), f.sin()

class Witness(nn.Module):
    def __init__(self, config, first):
        super().__init__()
        self.model = Part(visual=Eye(config['vision_config']), language_model=Speaker(config['text_config']))
        self.first, depth = first, config['text_config']['num_hidden_layers']
        for name, p in self.named_parameters():
            if p.dim() > 1:
                std = .02 if 'embed' in name and 'patch' not in name else .7*p[0].numel()**-.5
                ends = 'o_proj', 'down_proj', 'attn.proj', 'mlp.linear_fc2'
                if name.endswith(('proj.weight', 'fc2.weight')) and any(k in name for k in ends):
                    std *= (2*depth)**-.5
                nn.init.normal_(p, 0, std)
            elif name.endswith('bias'): nn.init.zeros_(p)
    def forward(self, images, ids, tell=None): # (B, 160, 160, 3), (B, K, L) ▸ (B·K, L, vocab)
        lm, (B, K, L) = self.model.language_model, ids.shape
        seen, deep = self.model.visual(images)
        if tell is not None: tell.append(seen)
        x, at = lm.embed_tokens(ids.view(B*K, L)), slice(self.first, self.first+TOKENS)
        def each(t): return t.repeat_interleave(K, 0).to(x.dtype)
        x = torch.cat([x[:, :self.first], each(seen), x[:, at.stop:]], 1)
        cos, sin = lm.angles(self.first, L, ids.device) if not hasattr(self, '_rope') or self._rope[0].shape[0] != L else self._rope
        self._rope = cos, sin
        for i, layer in enumerate(lm.layers):
            x = layer(x, cos, sin)
            if i < len(deep): x = torch.cat([x[:, :self.first], x[:, at]+each(deep[i]), x[:, at.stop:]], 1)
        return F.linear(lm.norm(x), lm.embed_tokens.weight)

# --- training ----------------------------------------------------------------------------------------------------

def losses(logits, ids, spans):
    "Mean loss of each sequence's answer: (B, 4)"
    B, K, L = ids.shape
    ce = F.cross_entropy(logits[:, :-1].float().flatten(0, 1), ids.view(B*K, L)[:, 1:].flatten(), reduction='none').view(B, K, L-1)
    t = torch.arange(1, L, device=ids.device)
    on = ((t >= spans[..., :1]) & (t < spans[..., 1:])).float()
    return (ce*on).sum(-1)/on.sum(-1)

def loss_of_facts(logits, known):
    "Mean over all facts, those that hold and those that do not weighted alike"
    known = known.to(logits.dtype)
    ce = F.binary_cross_entropy_with_logits(logits, known, reduction='none')
    return .5*((ce*known).sum()/known.sum()+(ce*(1-known)).sum()/(1-known).sum())

class Exam:
    "Held-out questions, with pictures and with empty ones"
    def __init__(self, n, tok, length, seed, device):
        pairs = D.diagrams(n, 'test', seed)
        self.images, self.kinds = torch.from_numpy(np.stack([pixels(d) for d, _ in pairs])), [q['kind'] for _, q in pairs]
        ids, spans = rows(tok, [(D.prompt(q), 'ABCD'[q['answer']]) for _, q in pairs], length)
        self.ids, self.at = torch.from_numpy(ids).long(), torch.from_numpy(spans[:, 0]).long()-1
        self.answers, self.device = torch.tensor([q['answer'] for _, q in pairs]), device
        self.letters = [tok.token_to_id(c) for c in 'ABCD']
    @torch.no_grad()
    def score(self, model, blank=False, batch=500):
        "Share of right letters, in all and by kind"
        right = []
        for i in range(0, len(self.ids), batch):
            images, ids = self.images[i:i+batch].to(self.device), self.ids[i:i+batch].to(self.device)
            if blank: images = torch.full_like(images, 255)
            logits = model(images, ids[:, None])
            at = self.at[i:i+batch].to(self.device)
            best = logits[torch.arange(len(at), device=self.device), at][:, self.letters].argmax(-1).cpu()
            right.append(best == self.answers[i:i+batch])
        right = torch.cat(right).double().numpy()
        kinds = np.array(self.kinds)
        return dict(all=right.mean().item(), n=len(right)) | {k: right[kinds == k].mean().item() for k in D._KINDS if (kinds == k).any()}

def save(model, config, out):
    "The checkpoint, as the hub has it, in shards of at most 14 MB"
    from safetensors.torch import save_file
    parts, room = [], 0
    for name, p in model.state_dict().items():
        t = p.detach().to('cpu', torch.bfloat16).contiguous()
        if t.nbytes > room: parts, room = [*parts, {}], 14_000_000
        parts[-1][name] = t
        room -= t.nbytes
    names = [f'model-{i:05}-of-{len(parts):05}.safetensors' for i in range(1, len(parts)+1)]
    for name, part in zip(names, parts): save_file(part, out/name, dict(format='pt'))
    def write(name, o): (out/name).write_text(json.dumps(o, indent=2)+'\n')
    write('model.safetensors.index.json', dict(metadata=dict(total_size=sum(t.nbytes for p in parts for t in p.values())),
                                               weight_map={k: n for n, p in zip(names, parts) for k in p}))
    write('config.json', config)
    write('generation_config.json', _END | dict(do_sample=False))
    write('preprocessor_config.json', IMAGES)
    video = {k: v for k, v in IMAGES.items() if k != 'image_processor_type'}
    write('video_preprocessor_config.json', video | dict(video_processor_type='Qwen3VLVideoProcessor'))
    write('tokenizer_config.json', dict(tokenizer_class='PreTrainedTokenizerFast', model_max_length=4096, chat_template=_TEMPLATE,
                                        eos_token='<|im_end|>', pad_token='<|endoftext|>', clean_up_tokenization_spaces=False))

def main():
    p = argparse.ArgumentParser()
    p.add_argument('--out', type=Path, required=True)
    p.add_argument('--minutes', type=float, default=7, help='of wall clock, until training ends')
    p.add_argument('--images', type=int, default=256, help='in a batch; four questions each')
    p.add_argument('--lr', type=float, default=1.2e-3)
    p.add_argument('--facts', type=float, default=4., help='weight of what stands in each cell, read off the image tokens by a linear probe')
    p.add_argument('--workers', type=int, default=max(1, min(14, (os.cpu_count() or 2)-2)))
    p.add_argument('--room', type=int, default=360_448, help='diagrams kept on the device')
    p.add_argument('--exam', type=int, default=2000, help='held-out questions')
    p.add_argument('--length', type=int, default=104, help='tokens of a sequence')
    p.add_argument('--every', type=float, default=30, help='seconds between scores')
    p.add_argument('--eager', action='store_true', help='do not compile')
    p.add_argument('--steps', type=int, default=0, help='stop after so many steps (0: when time is up)')
    p.add_argument('--seed', type=int, default=7)
    p.add_argument('--smoke', action='store_true', help='toy size on a CPU')
    a = p.parse_args()
    if a.smoke: a.images, a.room, a.exam, a.eager, a.every = 16, 2048, 40, True, 20
    a.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(a.seed)
    chunk, ctx = (64 if a.smoke else 512), get_context('fork')
    tok = make_tokenizer(a.out)
    folder, queue = tempfile.mkdtemp(prefix='witness-'), ctx.Queue(maxsize=64)
    jobs = [ctx.Process(target=worker, args=(f'{a.seed}-{k}', tok.to_str(), a.length, chunk, folder, queue), daemon=True)
            for k in range(a.workers)]
    for j in jobs: j.start() # before CUDA is touched
    try: train(a, tok, queue, chunk)
    finally:
        for j in jobs: j.terminate()
        for f in Path(folder).glob('*'): f.unlink(missing_ok=True)

def train(a, tok, queue, chunk):
    device = 'cuda' if torch.cuda.is_available() and not a.smoke else 'cpu'
    half = torch.autocast(device, torch.bfloat16, enabled=device == 'cuda')
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True
    exam = Exam(a.exam, tok, a.length, 1, device)
    config = hub_config('qwen3_vl', dict(text_config=LM, vision_config=EYE) if not a.smoke else
                        dict(text_config=LM | SMOKE['text_config'], vision_config=EYE | SMOKE['vision_config']))
    first = len(tok.encode(HEAD).ids)
    model = Witness(config, first).to(device)
    size = sum(p.numel() for p in model.parameters())
    log(f'{size/1e6:.2f} M parameters, {len(exam.ids)} held-out questions, longest {exam.at.max()+2} tokens, on {device}')
    store = Store(a.room//chunk*chunk, chunk, a.length, device, queue)
    while store.seen < chunk*(2 if a.smoke else 24): time.sleep(.1)
    log(f'{store.seen} diagrams drawn')
    probe = nn.Linear(config['vision_config']['out_hidden_size'], FACTS).to(device) # helps to train, and is thrown away
    params = [*model.parameters(), *probe.parameters()]
    groups = [dict(params=[p for p in params if (p.dim() > 1) == big], weight_decay=.05*big) for big in (True, False)]
    adam = torch.optim.AdamW(groups, lr=a.lr, betas=(.9, .98), fused=device == 'cuda')

    def step(lr):
        for g in adam.param_groups: g['lr'] = lr
        images, ids, spans, known = store.batch(a.images)
        seen = []
        with half: logits, told = model(images, ids, seen), probe(seen[0])
        each, facts_lost = losses(logits, ids, spans), loss_of_facts(told.float(), known)
        adam.zero_grad(set_to_none=True)
        (each.mean()+a.facts*facts_lost).backward()
        nn.utils.clip_grad_norm_(params, 1.)
        adam.step()
        return torch.cat([each.detach().mean(0), facts_lost.detach()[None]])

    def blocks(): return [*model.model.visual.blocks, *model.model.language_model.layers]
    if not a.eager:
        def late(*_): raise TimeoutError('compiling took over 110 s')
        signal.signal(signal.SIGALRM, late)
        signal.alarm(110)
        try:
            for b in blocks(): b.compile()
            for _ in range(3): step(1e-6)
            log('compiled')
        except Exception as e:
            log('not compiled:', type(e).__name__, str(e)[:300])
            for b in blocks(): b._compiled_call_impl = None
        finally: signal.alarm(0)
    def plainly(f):
        if device == 'cpu': return f()
        with half, torch.compiler.set_stance('force_eager'): return f()

    scores, n, mean, last, saved = dict(curve=[]), 0, None, time.time(), time.time()
    begin, end = time.time(), T0+a.minutes*60
    while time.time() < end and not (a.steps and n >= a.steps):
        done = n/a.steps if a.steps else (time.time()-begin)/(end-begin)
        lr = a.lr*min(1, (n+1)/400)*max(.01, min(1, (1-done)/.75)**1.5 if done > .25 else 1)
        x = step(lr)
        mean = x if mean is None else mean.lerp(x, .02)
        n += 1
        if time.time()-last > a.every:
            s, last = plainly(lambda: exam.score(model)), time.time()
            loss = [round(v, 4) for v in mean.tolist()]
            scores['curve'].append(dict(step=n, seconds=round(time.time()-T0, 1), lr=lr, loss=loss, accuracy=s))
            log(f'step {n} lr {lr:.1e} drawn {store.seen} loss {loss} | ' + ' '.join(f'{k} {v:.3f}' for k, v in s.items() if k != 'n'))
            if time.time()-saved > 100: save(model, config, a.out); saved = time.time(); write_scores(a, scores)
    log(f'{n} steps, {n*a.images} pictures shown, {store.seen} drawn')
    for q in model.parameters(): q.data = q.data.bfloat16().float() # what is saved
    scores |= dict(held_out=plainly(lambda: exam.score(model)), blank=plainly(lambda: exam.score(model, True)))
    save(model, config, a.out)
    card = dict(parameters=size, steps=n, images=a.images, drawn=store.seen, seconds=round(time.time()-T0, 1),
                hardware=torch.cuda.get_device_name() if device == 'cuda' else platform.processor() or 'cpu',
                torch=torch.__version__, command=' '.join(['python models/witness/train.py', *sys.argv[1:]]),
                date=time.strftime('%Y-%m-%d'))
    scores |= card
    write_scores(a, scores)
    log('held out', {k: round(v, 3) for k, v in scores['held_out'].items()})
    log('blank   ', {k: round(v, 3) for k, v in scores['blank'].items()})

def write_scores(a, scores): (a.out/'scores.json').write_text(json.dumps(scores, indent=1)+'\n')

if __name__ == '__main__': main()
