"""GRACE (Zhu et al. 2020), learning on the nodes of a graph, without its N x N matrices: python examples/graph_nodes.py [nodes]

Its loss contrasts a node's two views with all nodes of both: NT-Xent over these 2 N rows, so `NTXentLoss` is the whole of it.
Trains on a small graph, probes what came of it with five labels a class, then measures the loss of 20,000 nodes.
"""

import sys

import torch
from memory import peak_bytes, shown
from torch import Tensor, nn

from fastsupcon import NTXentLoss

NODES, CLASSES, FEATURES, WIDTH = 2000, 5, 128, 64


def stochastic_block_model() -> tuple[Tensor, Tensor, Tensor]:
    """Features in which the class is faint [N, D], edges of which five in seven stay within a class [2, E], and classes [N]."""
    classes = torch.arange(NODES) % CLASSES
    features = 0.2 * torch.randn(CLASSES, FEATURES)[classes] + torch.randn(NODES, FEATURES)
    chance = torch.where(classes[:, None] == classes, 5 * CLASSES, 2 * CLASSES / (CLASSES - 1)) / NODES
    pairs = (torch.rand(NODES, NODES) < chance).triu(1).nonzero().T
    return features, torch.cat([pairs, pairs.flip(0)], 1), classes


class GCN(nn.Module):
    """Two layers of D^-1/2 (A + I) D^-1/2 X W (Kipf & Welling 2017)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(FEATURES, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, features: Tensor, edges: Tensor) -> Tensor:
        rows, columns = torch.cat([edges, torch.arange(NODES).expand(2, -1)], 1)
        degrees = rows.bincount()
        weights = (degrees[rows] * degrees[columns]).rsqrt()
        graph = torch.sparse_coo_tensor(torch.stack([rows, columns]), weights, (NODES, NODES), check_invariants=True)
        return graph @ self.second(torch.relu(graph @ self.first(features)))


def view(features: Tensor, edges: Tensor, dropped: float = 0.4) -> tuple[Tensor, Tensor]:
    """Some features are masked in all nodes, and some edges are left out."""
    return features * (torch.rand(FEATURES) > dropped), edges[:, torch.rand(edges.shape[1]) > dropped]


def probe(rows: Tensor, classes: Tensor, labelled: int = 5 * CLASSES) -> float:
    """The accuracy of a linear classifier (ridge regression) of the first rows on all others."""
    x = nn.functional.pad((rows - rows.mean(0)) / rows.std(0), (0, 1), value=1)
    known, targets = x[:labelled], nn.functional.one_hot(classes[:labelled]).float()
    weight = torch.linalg.solve(known.T @ known + 10 * torch.eye(x.shape[1]), known.T @ targets)
    return (x[labelled:] @ weight).argmax(1).eq(classes[labelled:]).float().mean().item()


def main(nodes: int) -> None:
    torch.manual_seed(0)
    features, edges, classes = stochastic_block_model()
    encoder, head = GCN(), nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.ELU(), nn.Linear(WIDTH, WIDTH))
    optimizer = torch.optim.Adam([*encoder.parameters(), *head.parameters()], lr=5e-3)
    loss = NTXentLoss(temperature=0.5)

    raw, untrained = probe(features, classes), probe(encoder(features, edges).detach(), classes)
    for _ in range(20):
        z0, z1 = (head(encoder(*view(features, edges))) for _ in range(2))
        value = loss(z0, z1)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
    trained = probe(encoder(features, edges).detach(), classes)
    print(f"loss of {NODES:,} nodes: {value.item():.2f}, at chance {loss.chance_level(2 * NODES):.2f}")
    print(f"linear probe: raw features {raw:.1%}, untrained GCN {untrained:.1%}, trained GCN {trained:.1%}")

    depth = 128
    z0, z1 = (torch.randn(nodes, depth, requires_grad=True) for _ in range(2))
    peak = peak_bytes(lambda: loss(z0, z1).backward())
    plain = 4 * nodes**2 * z0.element_size()  # exponentials within and between views, from either view, are kept for the backward
    print(f"forward and backward of {nodes:,} x {depth}: {shown(peak)} over the rows, where four N x N matrices would be {shown(plain)}")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 20_000)
