package ocispec

import (
	"strconv"
	"testing"

	"github.com/opencontainers/cgroups"
	"github.com/opencontainers/runtime-spec/specs-go"
)

// The conversions are those that runc uses.
func TestConversionsAreRuncs(t *testing.T) {
	for shares := uint64(0); shares < 1<<18+10; shares++ {
		if got, want := cpuWeight(shares), cgroups.ConvertCPUSharesToCgroupV2Value(shares); got != want {
			t.Fatalf("%d shares weigh %d, want %d", shares, got, want)
		}
	}
	numbers := []int64{-1, 0, 1, 1 << 20, 1 << 21, 1 << 40}
	for _, limit := range numbers {
		for _, swap := range numbers {
			want, err := cgroups.ConvertMemorySwapToCgroupV2Value(swap, limit)
			bad := checkResources(&specs.LinuxResources{Memory: &specs.LinuxMemory{Limit: &limit, Swap: &swap}})
			if (err != nil) != (bad != nil) {
				t.Errorf("limit %d, swap %d: %v, want %v", limit, swap, bad, err)
			}
			if err != nil {
				continue
			}
			text := strconv.FormatInt(want, 10)
			switch {
			case want == -1:
				text = "max"
			case want == 0 && swap <= 0:
				text = ""
			}
			if got := swapMax(swap, limit); got != text {
				t.Errorf("limit %d, swap %d: %q, want %q", limit, swap, got, text)
			}
		}
	}
}

func TestPrivileged(t *testing.T) {
	deny := specs.LinuxDeviceCgroup{Access: "rwm"}
	allow := specs.LinuxDeviceCgroup{Allow: true, Access: "rwm"}
	for _, tc := range []struct {
		name  string
		rules []specs.LinuxDeviceCgroup
		want  bool
	}{
		{"none", nil, false},
		{"engine", []specs.LinuxDeviceCgroup{deny, {Allow: true, Type: "c", Major: ptr(int64(1)), Minor: ptr(int64(3)), Access: "rwm"}}, false},
		{"privileged", []specs.LinuxDeviceCgroup{deny, allow}, true},
		{"by wildcards", []specs.LinuxDeviceCgroup{{Allow: true, Type: "a", Major: ptr(int64(-1)), Minor: ptr(int64(-1)), Access: "mrw"}}, true},
		{"taken back", []specs.LinuxDeviceCgroup{allow, deny}, false},
		{"read only", []specs.LinuxDeviceCgroup{{Allow: true, Access: "r"}}, false},
	} {
		if got := privileged(&specs.LinuxResources{Devices: tc.rules}); got != tc.want {
			t.Errorf("%s: %v", tc.name, got)
		}
	}
	if privileged(nil) {
		t.Error("no resources at all are privileged")
	}
}
