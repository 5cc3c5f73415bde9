package agent

import (
	"testing"

	agentv1 "github.com/hyperhq/runv/api/agent/v1"
)

func TestParseNetDev(t *testing.T) {
	list := parseNetDev([]byte("Inter-|   Receive                                                |  Transmit\n" +
		" face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n" +
		"    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0\n" +
		"  eth0:    1000      10    1    2    0     0          0         0     2000      20    3    4    0     0       0          0\n" +
		"broken: 1 2\n"))
	if len(list) != 1 {
		t.Fatalf("%v", list)
	}
	want := &agentv1.NetworkStats{
		Name: "eth0", RxBytes: 1000, RxPackets: 10, RxErrors: 1, RxDropped: 2,
		TxBytes: 2000, TxPackets: 20, TxErrors: 3, TxDropped: 4,
	}
	if got := list[0]; got.String() != want.String() {
		t.Errorf("%v, want %v", got, want)
	}
}
