"""Actor and critic networks (Huang, Fig. 2), several agents stacked: every weight has a leading agent axis.

A network is a plain dict of tensors; one matrix product per layer serves all agents (`torch.baddbmm`). The numpy
twin of the actor, used when serving, is in `actors.py`; a test holds the two together.

Choices that the paper leaves open: ReLU after embeddings and hidden layers; an LSTM state of 32; uniform
initialisation within 1/sqrt(inputs); the three LSTM cells pass their hidden and cell state on, and each gets the
hidden layer's output joined with the previous sub-action's distribution, zero-padded to the largest sub-action. The
critic embeds a request together with its service token and its agent's action.
"""

import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

Parameters = dict[str, Tensor]


@dataclass(frozen=True)
class ActorShape:
    """Sizes of an actor: observation groups, sub-actions (configurations, variants, nodes) and layers."""

    groups: tuple[int, ...]
    actions: tuple[int, int, int]
    embedding: int = 32
    hidden: tuple[int, ...] = (256, 256)
    lstm: int = 32
    autoregressive: bool = True


@dataclass(frozen=True)
class CriticShape:
    """Sizes of a critic: U requests of `request` features, K nodes, `links` bandwidths; `heads` Q-values.

    With `actions` empty it is a state-value network (HAPPO).
    """

    requests: int
    request: int
    nodes: int
    links: int
    actions: tuple[int, ...]
    heads: int = 3
    embedding: int = 32
    hidden: tuple[int, ...] = (512, 512, 256, 256, 128)


def _linear(parameters: Parameters, name: str, count: int, inputs: int, outputs: int, rng: torch.Generator) -> None:
    bound = 1.0 / math.sqrt(inputs)
    parameters[f"{name}.weight"] = (torch.rand(count, inputs, outputs, generator=rng) * 2 - 1) * bound
    parameters[f"{name}.bias"] = (torch.rand(count, 1, outputs, generator=rng) * 2 - 1) * bound


def apply(parameters: Parameters, name: str, inputs: Tensor) -> Tensor:
    """One stacked linear layer: (n, B, in) to (n, B, out)."""
    return torch.baddbmm(parameters[f"{name}.bias"], inputs, parameters[f"{name}.weight"])


def actor_parameters(shape: ActorShape, agents: int, rng: torch.Generator) -> Parameters:
    """Fresh parameters of `agents` stacked actors."""
    parameters: Parameters = {}
    for g, size in enumerate(shape.groups):
        _linear(parameters, f"embed{g}", agents, size, shape.embedding, rng)
    width = shape.embedding * len(shape.groups)
    for h, size in enumerate(shape.hidden):
        _linear(parameters, f"hidden{h}", agents, width, size, rng)
        width = size
    for d, size in enumerate(shape.actions):
        if shape.autoregressive:
            inputs = width + max(shape.actions) + shape.lstm
            _linear(parameters, f"cell{d}", agents, inputs, 4 * shape.lstm, rng)
            _linear(parameters, f"head{d}", agents, shape.lstm, size, rng)
        else:
            _linear(parameters, f"head{d}", agents, width, size, rng)
    return parameters


def actor_log_probs(
    shape: ActorShape, parameters: Parameters, observation: Tensor, masks: tuple[Tensor, Tensor, Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """Log-probabilities (n, B, size) of the three sub-actions; masks (n, 1, size) are 0 or a large negative."""
    ends = list(itertools.accumulate(shape.groups, initial=0))
    groups = [observation[:, :, a:b] for a, b in itertools.pairwise(ends)]
    features = torch.cat([torch.relu(apply(parameters, f"embed{g}", x)) for g, x in enumerate(groups)], dim=2)
    for h in range(len(shape.hidden)):
        features = torch.relu(apply(parameters, f"hidden{h}", features))
    found = []
    state = features.new_zeros(*features.shape[:2], shape.lstm)
    memory = state
    previous = features.new_zeros(*features.shape[:2], max(shape.actions))
    for d, size in enumerate(shape.actions):
        if shape.autoregressive:
            gates = apply(parameters, f"cell{d}", torch.cat([features, previous, state], dim=2))
            enter, forget, update, leave = gates.chunk(4, dim=2)
            memory = torch.sigmoid(forget) * memory + torch.sigmoid(enter) * torch.tanh(update)
            state = torch.sigmoid(leave) * torch.tanh(memory)
            logits = apply(parameters, f"head{d}", state)
        else:
            logits = apply(parameters, f"head{d}", features)
        log_probs = torch.log_softmax(logits + masks[d], dim=2)
        previous = torch.nn.functional.pad(log_probs.exp(), (0, max(shape.actions) - size))
        found.append(log_probs)
    return found[0], found[1], found[2]


def critic_parameters(shape: CriticShape, count: int, rng: torch.Generator) -> Parameters:
    """Fresh parameters of `count` stacked critics (2: the twins)."""
    parameters: Parameters = {}
    embed, width = shape.embedding, shape.embedding * (shape.requests + 2 + bool(shape.links))
    _linear(parameters, "request", count, shape.request + sum(shape.actions), embed, rng)
    _linear(parameters, "work", count, shape.nodes, embed, rng)
    _linear(parameters, "memory", count, shape.nodes, embed, rng)
    if shape.links:
        _linear(parameters, "links", count, shape.links, embed, rng)
    for h, size in enumerate(shape.hidden):
        _linear(parameters, f"hidden{h}", count, width, size, rng)
        width = size
    _linear(parameters, "out", count, width, shape.heads, rng)
    return parameters


def critic_state(
    shape: CriticShape, parameters: Parameters, requests: Tensor, nodes: Tensor, links: Tensor
) -> tuple[Tensor, Tensor]:
    """What the state alone gives: the requests' embeddings before activation (n, B, U, embedding), and the first
    hidden layer before activation without the requests (n, B, hidden).

    requests (B, U, request) with the service token; nodes (B, 2K): workload and memory; links (L,). Splitting the
    first layers lets the eight sequential updates of one minibatch share this part.
    """
    count, rows = parameters["out.weight"].shape[0], len(requests)
    flat = requests.reshape(1, -1, shape.request).expand(count, -1, -1)
    mine = torch.baddbmm(parameters["request.bias"], flat, parameters["request.weight"][:, : shape.request])
    work, memory = nodes.unsqueeze(0).expand(count, -1, -1).chunk(2, dim=2)
    parts = [torch.relu(apply(parameters, "work", work)), torch.relu(apply(parameters, "memory", memory))]
    if shape.links:
        link = torch.relu(apply(parameters, "links", links.expand(count, 1, -1)))
        parts.append(link.expand(-1, rows, -1))
    weight = parameters["hidden0.weight"][:, shape.requests * shape.embedding :]
    rest = torch.baddbmm(parameters["hidden0.bias"], torch.cat(parts, dim=2), weight)
    return mine.reshape(count, rows, shape.requests, shape.embedding), rest


def critic_values(
    shape: CriticShape, parameters: Parameters, state: tuple[Tensor, Tensor], actions: Tensor | None
) -> Tensor:
    """Q-values (n, B, heads) from `critic_state`'s result and one-hot actions (B, U, sum of sub-actions)."""
    mine, rest = state
    if actions is not None:
        flat = actions.reshape(1, -1, actions.shape[2]).expand(len(rest), -1, -1)
        mine = mine + (flat @ parameters["request.weight"][:, shape.request :]).reshape(mine.shape)
    embedded = torch.relu(mine).flatten(2)
    features = torch.relu(torch.baddbmm(rest, embedded, parameters["hidden0.weight"][:, : embedded.shape[2]]))
    for h in range(1, len(shape.hidden)):
        features = torch.relu(apply(parameters, f"hidden{h}", features))
    return apply(parameters, "out", features)


def straight_through(log_probs: Tensor, rng: torch.Generator) -> Tensor:
    """One-hot samples whose gradient is that of the Gumbel-softmax at temperature 1 (Jang et al. 2016)."""
    uniform = torch.rand(log_probs.shape, generator=rng, device=log_probs.device)
    noise = -torch.log(-torch.log(uniform.clamp(1e-20, 1.0 - 1e-7)))
    soft = torch.softmax(log_probs + noise, dim=-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(dim=-1, keepdim=True), 1.0)
    return hard + soft - soft.detach()
