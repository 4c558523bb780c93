"""Sentence embeddings by the multiple-negatives ranking loss, where a batch holds a document twice: python examples/sentence_embeddings.py

A query's negatives are the batch's other documents: a second text of its own document is a false one, unless `keys` number the documents.
Trains a tiny transformer on pairs of paraphrases with and without keys; then queries of unseen documents search among them.
"""

import torch
from torch import Tensor, nn

from fastsupcon import InfoNCELoss

CONCEPTS, SYNONYMS, FILLERS, WIDTH = 60, 4, 40, 64
DOCUMENTS, BATCH, STEPS = 100, 256, 60  # 2.6 texts of each document in a batch


class SentenceEncoder(nn.Module):
    """The mean over the words' outputs of two transformer layers."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(CONCEPTS * SYNONYMS + FILLERS, WIDTH)
        layer = nn.TransformerEncoderLayer(WIDTH, nhead=4, dim_feedforward=2 * WIDTH, batch_first=True)
        self.layers = nn.TransformerEncoder(layer, num_layers=2, enable_nested_tensor=False)

    def forward(self, texts: Tensor) -> Tensor:
        return self.layers(self.words(texts)).mean(1)


def documents(count: int) -> Tensor:
    """What each is about: three concepts [count, 3]."""
    return torch.rand(count, CONCEPTS).argsort(1)[:, :3]


def texts_of(concepts: Tensor) -> Tensor:
    """A text of each document: one of the four words for each of its concepts and three fillers, in any order [N, 6]."""
    words = concepts * SYNONYMS + torch.randint(SYNONYMS, concepts.shape)
    fillers = CONCEPTS * SYNONYMS + torch.randint(FILLERS, concepts.shape)
    texts = torch.cat([words, fillers], 1)
    return texts.gather(1, torch.rand(texts.shape).argsort(1))


def train(with_keys: bool) -> SentenceEncoder:
    torch.manual_seed(0)
    about, encoder = documents(DOCUMENTS), SentenceEncoder()
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=3e-3)
    loss = InfoNCELoss(temperature=0.05, symmetric=False)
    for _ in range(STEPS):
        keys = torch.randint(DOCUMENTS, (BATCH,))
        queries, answers = (encoder(texts_of(about[keys])) for _ in range(2))
        optimizer.zero_grad()
        loss(queries, answers, keys=keys if with_keys else None).backward()
        optimizer.step()
    return encoder.eval()


@torch.no_grad()
def recall_at_1(encoder: SentenceEncoder, count: int = 500) -> float:
    """The share of queries whose nearest text is of their document, among documents that were not trained on."""
    torch.manual_seed(1)
    about = documents(count)
    queries, answers = (nn.functional.normalize(encoder(texts_of(about)), dim=1) for _ in range(2))
    return (queries @ answers.T).argmax(1).eq(torch.arange(count)).float().mean().item()


def main() -> None:
    print(f"untrained:    recall@1 {recall_at_1(SentenceEncoder().eval()):.1%} of 500 unseen documents")
    print(f"without keys: recall@1 {recall_at_1(train(with_keys=False)):.1%}")
    print(f"with keys:    recall@1 {recall_at_1(train(with_keys=True)):.1%}")


if __name__ == "__main__":
    main()
