"""All-to-alls on a cluster's links: who sends when, and who waits for whom.

Every GPU has a port to its node in each direction, every network adapter one to the network. A sender's
messages leave one after another, to nodes and places in turn from its own on, so that in each step every
rank has another partner; on a real network, where all are under way at once, they share ports alike. A
message holds the receiver's port as long as the sender's, from when it arrives or the port is free; what
waits for a receiver waits in the network, and does not hold up the sender's next.
"""

import numpy


def take_turns(work, cores):
    """When each of a node's ranks is done [ranks] that begin together and share its cores alike: while more
    are at work than there are cores, each has its part of them."""
    order = numpy.argsort(work)
    at_work = numpy.arange(len(work), 0, -1)
    rounds = numpy.diff(work[order], prepend=0.0) * numpy.maximum(1.0, at_work / cores)
    done = numpy.empty(len(work))
    done[order] = numpy.cumsum(rounds)
    return done


class Fabric:
    """The links of `ranks` consecutive GPUs, beginning with a node's first."""

    def __init__(self, machine, ranks):
        self.machine = machine
        self.ranks = ranks
        self.rank = numpy.arange(ranks)
        self.node = self.rank // machine.gpus_per_node
        self.nic = self.rank // machine.gpus_per_nic

    def all_to_all(self, bytes_to, ready, way="flat"):
        """When each rank has all of its rows [ranks], given the bytes [from, to] and when each begins."""
        if way == "flat" or self.node[-1] == 0:
            return self._send(bytes_to, ready)
        return self._two_hops(bytes_to, ready)

    def _send(self, bytes_to, ready):
        """One message for every pair with bytes between them, in rank order."""
        free = {port: numpy.zeros(self.ranks) for port in ("node out", "node in", "nic out", "nic in")}
        done = numpy.array(ready, dtype=float)
        ready = done.copy()
        for target in self._partners():
            size = bytes_to[self.rank, target]
            within = self.node == self.node[target]
            self._step(within & (size > 0), target, size, ready, done, free, "node", self.rank, self.machine.node)
            # GPUs that share an adapter take turns at it.
            for turn in range(self.machine.gpus_per_nic):
                mine = ~within & (size > 0) & (self.rank % self.machine.gpus_per_nic == turn)
                self._step(mine, target, size, ready, done, free, "nic", self.nic, self.machine.network)
        return done

    def _partners(self):
        """For each step the rank that each rank sends to."""
        size = min(self.ranks, self.machine.gpus_per_node)
        nodes = self.ranks // size
        node, place = numpy.divmod(self.rank, size)
        for step in range(1, self.ranks):
            further_node, further_place = divmod(step, size)
            yield (node + further_node) % nodes * size + (place + further_place) % size

    def _step(self, senders, target, size, ready, done, free, kind, port, link):
        source = self.rank[senders]
        if not len(source):
            return
        target = target[source]
        leaves, arrives = port[source], port[target]
        busy = link.message + size[source] / link.bandwidth
        begin = numpy.maximum(ready[source], free[f"{kind} out"][leaves])
        sent = begin + busy
        received = numpy.maximum(begin + link.latency, free[f"{kind} in"][arrives]) + busy
        free[f"{kind} out"][leaves] = sent
        free[f"{kind} in"][arrives] = received
        # No rank is twice among the senders of a step, nor among the receivers.
        done[source] = numpy.maximum(done[source], sent)
        done[target] = numpy.maximum(done[target], received)

    def _two_hops(self, bytes_to, ready):
        """Within the node to who has the destination's place, then one message to each other node."""
        size = self.machine.gpus_per_node
        nodes = self.ranks // size
        by_node = bytes_to.reshape(nodes, size, nodes, size)  # from node, from place, to node, to place
        first = numpy.zeros((self.ranks, self.ranks))
        second = numpy.zeros((self.ranks, self.ranks))
        to_place = by_node.sum(axis=2)  # [node, from place, to place]
        to_node = by_node.sum(axis=1)  # [node, to node, place]
        places = numpy.arange(size)
        for node in range(nodes):
            here = slice(node * size, (node + 1) * size)
            first[here, here] = to_place[node]
            for other in range(nodes):
                if other != node:
                    second[node * size + places, other * size + places] = to_node[node, other]
        counts = numpy.zeros((self.ranks, self.ranks))
        counts[self.node[:, None] == self.node[None, :]] = 8.0 * nodes
        copies = 2 * bytes_to.sum(axis=1) / self.machine.copy  # gathered again, and put in order
        return self._send(second, self._send(first, self._send(counts, ready)) + copies)

    def all_reduce(self, size, members, spread):
        """Seconds for `size` bytes on each of `members` GPUs, of which `spread` are on one node: within
        the nodes, then between them on all adapters at once, in a ring or, where that is quicker, a tree."""
        if members <= 1:
            return 0.0
        machine, seconds = self.machine, 0.0
        if spread > 1:
            seconds += 2 * (size * (spread - 1) / spread / machine.node.bandwidth + machine.node.latency)
        nodes = -(-members // spread)
        if nodes > 1:
            part = size / spread * machine.gpus_per_nic
            moved = part * (nodes - 1) / nodes / machine.network.bandwidth
            hops = min(nodes - 1, 2 * (nodes - 1).bit_length())
            seconds += 2 * (moved + hops * (machine.network.latency + machine.network.message))
        return seconds
