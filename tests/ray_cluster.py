"""`python -m tests.ray_cluster`: a Ray cluster of three nodes on one machine, as the chart makes one of three groups.

Head, one node that offers an attention place and one that offers two expert places. Prints `address HOST:PORT`, and
ends when its stdin does.
"""

import sys

from ray.cluster_utils import Cluster


def main():
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 4, "include_dashboard": False})
    try:
        cluster.add_node(num_cpus=1, resources={"shoal_attention": 1})
        cluster.add_node(num_cpus=2, resources={"shoal_expert": 2})
        cluster.wait_for_nodes(60)
        sys.stdout.write(f"address {cluster.address}\n")
        sys.stdout.flush()
        sys.stdin.read()
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
