package ocispec

import (
	"encoding/json"
	"reflect"
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"
)

func resources(t testing.TB, text string) *specs.LinuxResources {
	t.Helper()
	r, err := LoadResources(strings.NewReader(text))
	if err != nil {
		t.Fatalf("%s: %v", text, err)
	}
	return r
}

func TestMergeResources(t *testing.T) {
	for _, tc := range []struct{ name, old, change, want string }{
		{"nothing", `{"memory":{"limit":5}}`, `{}`, `{"memory":{"limit":5}}`},
		{"from nothing", `{}`, `{"pids":{"limit":7}}`, `{"pids":{"limit":7}}`},
		{"one of two", `{"memory":{"limit":5,"swap":9}}`, `{"memory":{"limit":6}}`, `{"memory":{"limit":6,"swap":9}}`},
		{"without a limit swap has none", `{"memory":{"limit":5,"swap":9}}`, `{"memory":{"limit":-1}}`, `{"memory":{"limit":-1}}`},
		{"zero is not given", `{"memory":{"limit":5},"cpu":{"shares":3,"quota":4}}`, `{"memory":{"limit":0},"cpu":{"shares":0,"quota":0}}`, `{"memory":{"limit":5},"cpu":{"shares":3,"quota":4}}`},
		{"zero is a value", `{"cpu":{"burst":3,"idle":1}}`, `{"cpu":{"burst":0,"idle":0}}`, `{"cpu":{"burst":0,"idle":0}}`},
		{"unified", `{"unified":{"memory.high":"1","cpu.max":"max"}}`, `{"unified":{"memory.high":"2"}}`, `{"unified":{"memory.high":"2","cpu.max":"max"}}`},
		{"lists", `{"hugepageLimits":[{"pageSize":"2MB","limit":1}]}`, `{"blockIO":{"weight":10}}`, `{"hugepageLimits":[{"pageSize":"2MB","limit":1}],"blockIO":{"weight":10}}`},
		{"devices stay out", `{"devices":[{"allow":true,"access":"r"}]}`, `{"devices":[{"allow":true,"access":"w"}]}`, `{}`},
		{"a check is of one update", `{"memory":{"checkBeforeUpdate":true}}`, `{"memory":{"limit":5}}`, `{"memory":{"limit":5}}`},
	} {
		old, change := resources(t, tc.old), resources(t, tc.change)
		before, _ := json.Marshal(old)
		got, err := json.Marshal(MergeResources(old, change))
		if err != nil {
			t.Fatal(err)
		}
		want, _ := json.Marshal(resources(t, tc.want))
		if string(got) != string(want) {
			t.Errorf("%s: %s, want %s", tc.name, got, want)
		}
		if after, _ := json.Marshal(old); string(after) != string(before) {
			t.Errorf("%s: the old limits became %s", tc.name, after)
		}
	}
}

func TestHostResources(t *testing.T) {
	for _, text := range []string{`{}`, `{"devices":[{"allow":false,"access":"rwm"}]}`, `{"memory":{},"cpu":{},"pids":{},"blockIO":{}}`} {
		if got := HostResources(resources(t, text)); got != nil {
			t.Errorf("%s: %v", text, got)
		}
	}
	got := HostResources(resources(t, `{"memory":{"limit":1},"cpu":{"cpus":"0"},"blockIO":{"weightDevice":[{"major":8,"minor":1,"weight":500}],
		"throttleReadBpsDevice":[{"major":8,"minor":0,"rate":9}]},"network":{"classID":1,"priorities":[{"name":"eth0","priority":3}]}}`))
	if got.GetMemoryLimit() != 1 || got.Cpus != "0" || got.BlockIoWeightDevices[0].GetWeight() != 500 || got.ThrottleReadBps[0].Rate != 9 ||
		got.GetNetworkClassId() != 1 || got.NetworkPriorities[0].Name != "eth0" {
		t.Errorf("%v", got)
	}
}

// Whatever `update --resources` is given is refused or becomes a request, and
// merging it once more changes nothing.
func FuzzResources(f *testing.F) {
	f.Add(`{"memory":{"limit":64,"swap":-1},"cpu":{"quota":1000,"cpus":"0-3"}}`, `{"pids":{"limit":0},"unified":{"memory.high":"max"}}`)
	f.Add(`{"blockIO":{"weight":10,"throttleReadBpsDevice":[{"major":1,"minor":2,"rate":3}]}}`, `{"hugepageLimits":[{"pageSize":"2MB","limit":3}]}`)
	f.Add(`{"network":{"priorities":[{}]},"rdma":{"x":{}}}`, `null`)
	f.Fuzz(func(t *testing.T, a, b string) {
		old, err := LoadResources(strings.NewReader(a))
		if err != nil {
			return
		}
		change, err := LoadResources(strings.NewReader(b))
		if err != nil {
			return
		}
		merged := MergeResources(old, change)
		if again := MergeResources(merged, change); !reflect.DeepEqual(merged, again) {
			t.Errorf("merged twice: %+v, once: %+v", again, merged)
		}
		_ = HostResources(merged)
		if _, err := TranslateResources(merged, 1, func(string) {}); err != nil && strings.ContainsAny(err.Error(), "\n\x00") {
			t.Errorf("the error is not one line: %q", err)
		}
	})
}
