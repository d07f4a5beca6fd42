"""PyTorch's matrix products on the shapes that `arriero bench ceiling --json` lists: one JSON line.

    torch_products.py CEILING.json --dtype bf16 --steps 6
"""

import json
import resource

import work

args = work.arguments(__doc__)

import torch  # noqa: E402

torch.set_num_threads(args.threads)
torch.manual_seed(1)
DTYPE = torch.bfloat16 if args.dtype == "bf16" else torch.float32
with open(args.model, encoding="utf-8") as file:
    products = json.load(file)["products"]


def seconds(m, n, k, layout, add):
    """The median time of one product with the operands lying as `layout` says, into a result that exists."""
    a = torch.rand(k, m, dtype=DTYPE).t() if layout == "TN" else torch.rand(m, k, dtype=DTYPE)
    b = torch.rand(n, k, dtype=DTYPE).t() if layout == "NT" else torch.rand(k, n, dtype=DTYPE)
    out = torch.zeros(m, n, dtype=DTYPE)
    product = (lambda: out.addmm_(a, b)) if add else (lambda: torch.mm(a, b, out=out))
    return work.median_time(product, args.steps)


with torch.no_grad():
    for product in products:
        m, n, k = (product[size] for size in "mnk")
        product["seconds"] = seconds(m, n, k, product["layout"], product["add"])
        product["gflops"] = 2e-9 * m * n * k / product["seconds"]
print(json.dumps({
    "products": products,
    "products_s": sum(product["seconds"] * product["count"] for product in products),
    "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    "versions": {"torch": torch.__version__},
    "threads": torch.get_num_threads(),
}))
