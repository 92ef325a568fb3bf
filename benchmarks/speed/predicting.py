"""K members on a validation set: ours against the ways to do it with PEFT."""

import argparse
from typing import Any

from options import Figures, add_examples, add_rounds, add_task, command
from ours import Prediction, our_prediction
from peers_predict import peft_mixed_batch, peft_prediction
from rounds import alternate, spread, table
from setting import EVERY, load
from training import points

from bayesian_lora.data.batching import TokenisedSet


def add(commands: Any) -> None:
    examples = ["--members 20", "--members 1 5 10 20 50 --examples 200 --json runs/speed.jsonl"]
    parser = command(commands, "predict", predict, examples)
    add_task(parser)
    parser.add_argument("--members", type=int, nargs="+", default=[20], help="K, default 20")
    add_examples(parser, EVERY, "validation")
    add_rounds(parser)


def predict(given: argparse.Namespace) -> Figures:
    """K members on the validation set, against PEFT's set_adapter loop and adapter_names.

    One K: every peer, in texts a second times K. Several: seconds over K, with the set_adapter
    loop in float32 alone. PEFT's batches of 32 are collated beforehand, ours are made in the
    time measured; the warming round has one member (of adapter_names and of ours, too).
    """
    data = load(given.task, "validation", given.examples)
    print(f"{given.task} validation: {len(data)} texts, {data.lengths.mean():.1f} tokens a text")
    if len(given.members) > 1:
        return _over_members(data, given)
    k = given.members[0]
    ours = ["ours, float32", "ours, bfloat16"]
    cases: dict[str, Prediction] = {
        ours[0]: our_prediction(data, k, "float32"),
        ours[1]: our_prediction(data, k, "bfloat16"),
        "set_adapter, unsorted, fp32": peft_prediction(data, k, half=False, by_length=False),
        "set_adapter, sorted, fp32": peft_prediction(data, k, half=False, by_length=True),
        "set_adapter, unsorted, bf16": peft_prediction(data, k, half=True, by_length=False),
        "set_adapter, sorted, bf16": peft_prediction(data, k, half=True, by_length=True),
        "adapter_names, sorted, fp32": peft_mixed_batch(data, k),
    }
    rates = alternate(cases, given.rounds)
    print("\n".join([f"\n{k} members", *table(rates, ours, "members × texts/s")]))
    return {"members": k, "texts": len(data), "rates": rates}


def _over_members(data: TokenisedSet, given: argparse.Namespace) -> Figures:
    cases: dict[str, Prediction] = {}
    for k in given.members:
        cases[f"ours, float32, K = {k}"] = our_prediction(data, k, "float32")
        cases[f"ours, bfloat16, K = {k}"] = our_prediction(data, k, "bfloat16")
        for order in ("unsorted", "sorted"):
            case = peft_prediction(data, k, half=False, by_length=order == "sorted")
            cases[f"set_adapter, {order}, fp32, K = {k}"] = case
    rates = alternate(cases, given.rounds)
    seconds = {
        name: [cases[name].members * len(data) / rate for rate in values]
        for name, values in rates.items()
    }
    print("\n| | seconds |\n|---|---|")
    for name, values in seconds.items():
        print(f"| {name} | {spread(values).format(2)} |")
    return {"texts": len(data), "points": points(seconds, ", K = ")}
