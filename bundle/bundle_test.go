package bundle

import (
	"strings"
	"testing"

	"github.com/opencontainers/runtime-spec/specs-go"

	"github.com/hyperhq/runv/client"
)

func TestNetwork(t *testing.T) {
	ns := func(typ specs.LinuxNamespaceType, path string) *specs.Spec {
		return &specs.Spec{Linux: &specs.Linux{Namespaces: []specs.LinuxNamespace{{Type: specs.PIDNamespace}, {Type: typ, Path: path}}}}
	}
	for _, tc := range []struct {
		spec *specs.Spec
		want string
	}{
		{&specs.Spec{}, client.NetworkHost},
		{ns(specs.MountNamespace, ""), client.NetworkHost},
		{ns(specs.NetworkNamespace, ""), client.NetworkNew},
		{ns(specs.NetworkNamespace, "/proc/self/ns/net"), "/proc/self/ns/net"},
	} {
		if got, _, err := network(tc.spec); err != nil || got != tc.want {
			t.Errorf("%q, %v; want %q", got, err, tc.want)
		}
	}
	for _, path := range []string{"/not/here", "/proc/self/ns/uts", "/dev/null"} {
		if got, _, err := network(ns(specs.NetworkNamespace, path)); err == nil || !strings.Contains(err.Error(), "linux.namespaces[1].path") {
			t.Errorf("%s: %q, %v", path, got, err)
		}
	}
}
