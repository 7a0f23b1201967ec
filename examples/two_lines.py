"""A Flower app of anybody's, on few bytes: the two lines that say privet are all that is new.

Here it runs in this process, on scikit-learn's handwritten digits; with `flwr run` it is the same app.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from sklearn.datasets import load_digits
from torch import nn

from privet.federation.flower import CodecMod, CodecStrategy, LocalGrid

CLIENTS, ROUNDS = 10, 15

digits = load_digits()
pixels = torch.from_numpy(digits.data).float() / 16
labels = torch.from_numpy(digits.target)
order = torch.from_numpy(np.random.default_rng(0).permutation(len(labels)))
test, *parts = order.tensor_split([400, *range(540, len(labels), 140)])


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))


app = ClientApp(mods=[CodecMod()])  # line one


@app.train()
def train(message: Message, context: Context) -> Message:
    model = network()
    model.load_state_dict(message.content["arrays"].to_torch_state_dict())
    mine = parts[int(context.node_config["partition-id"])]
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for batch in mine.repeat(3).split(16):
        optimizer.zero_grad()
        F.cross_entropy(model(pixels[batch]), labels[batch]).backward()
        optimizer.step()
    metrics = MetricRecord({"num-examples": len(mine)})
    return Message(
        RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message
    )


server = ServerApp()


@server.main()
def serve(grid: Grid, context: Context) -> None:
    strategy = CodecStrategy(FedAvg(fraction_train=0.5, fraction_evaluate=0.0))  # line two
    result = strategy.start(grid=grid, initial_arrays=ArrayRecord(network().state_dict()), num_rounds=ROUNDS)
    model = network()
    model.load_state_dict(result.arrays.to_torch_state_dict())
    right = (model(pixels[test]).argmax(1) == labels[test]).float().mean()
    moved = sum(one.down + one.up for one in strategy.rounds)
    print(f"{right:.1%} right; {moved:,} bytes moved in {ROUNDS} rounds")


if __name__ == "__main__":
    grid = LocalGrid(app, [{"partition-id": number} for number in range(CLIENTS)])
    server(grid, Context(1, 0, {}, RecordDict(), {}))
