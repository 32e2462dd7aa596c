#!/usr/bin/env bash
# Compares the two values of --exchange on two hosts with a slow link: network namespaces of this machine, so it needs
# root, iproute2 and the data of scripts/quickstart.sh. Prints tokens/s of each.
#
#   RATE=200mbit bash benchmarks/slow_link.sh -p zero2 --accumulation_steps 16    further flags of pretrain.py
set -euo pipefail

# shellcheck source=scripts/setup.sh
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/setup.sh"
set_up

output=$(mktemp -d)
end() {
    ip netns delete host0 || true
    ip netns delete host1 || true
    rm -rf "$output"
}
trap end EXIT
for host in 0 1; do
    ip netns add host$host
    ip -n host$host link set lo up
done
ip link add eth0 netns host0 type veth peer name eth0 netns host1
for host in 0 1; do
    ip -n host$host address add 10.78.0.1$host/24 dev eth0
    ip -n host$host link set eth0 up
    tc -n host$host qdisc add dev eth0 root tbf rate "${RATE:-200mbit}" burst 128kb latency 100ms
done

train() { # HOST EXCHANGE FLAG...
    GLOO_SOCKET_IFNAME=eth0 OMP_NUM_THREADS=1 ip netns exec "host$1" "$python" -m torch.distributed.run \
        --nnodes 2 --node_rank "$1" --master_addr 10.78.0.10 --master_port 29400 \
        pretrain.py -c tiny -d quickstart/data --tokenizer quickstart/tokenizer --cache_dir "$output/cache" \
        -x bf16 -b 1 -l 64 -s 1 --max_steps 5 --log_interval 1 --exchange "$2" \
        -o "$output/$2" -t "$output/$2-logs" "${@:3}" >"$output/log$1" 2>&1 ||
        fail "host $1 with --exchange $2: $(tail -n 20 "$output/log$1")"
}

for exchange in micro_batch step; do
    train 1 $exchange "$@" &
    train 0 $exchange "$@"
    wait $!
done
for exchange in micro_batch step; do
    "$python" - "$exchange" "$output/$exchange-logs/metrics.jsonl" <<'END'
import json, statistics, sys
rows = [json.loads(line) for line in open(sys.argv[2])][1:]
print(f"{sys.argv[1]:12} {statistics.median(row['tokens_per_second'] for row in rows):8,.0f} tokens/s, "
      f"last loss {rows[-1]['loss']:.6f}")
END
done
