"""Real text through the model that comes along, beside `transformers`."""

import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from engine import Engine
from engine.model.loader import locate
from tests.data import real_data
from tests.engine import oracle

TOKENS = 3000


def test_perplexity_on_wikitext_is_that_of_transformers():
    text = real_data("text/wikitext2_test.txt").read_text()[:20_000]
    module = AutoModelForCausalLM.from_pretrained(locate("needle-tiny")).eval()
    with Engine.from_pretrained("needle-tiny") as engine:
        tokens = engine.tokenize(text)[:TOKENS]
        ours = F.cross_entropy(engine.logits(tokens)[:-1], torch.tensor(tokens[1:]))
    theirs = F.cross_entropy(oracle.logits(module, tokens)[:-1], torch.tensor(tokens[1:]))
    assert len(tokens) == TOKENS
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)
