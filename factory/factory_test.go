package factory

import (
	"context"
	"errors"
	"strings"
	"testing"

	"github.com/hyperhq/runv/hypervisor"
)

type driver struct {
	hypervisor.Driver
	got hypervisor.Config
	err error
}

func (*driver) Name() string    { return "fake" }
func (*driver) Version() string { return "0" }

func (d *driver) Start(_ context.Context, c hypervisor.Config) (hypervisor.VM, error) {
	d.got = c
	return nil, d.err
}

func TestDirect(t *testing.T) {
	boom := errors.New("boom")
	d := &driver{err: boom}
	f := Direct(d)
	defer f.Close()
	good := hypervisor.Config{Name: "pod", VCPUs: 1, MemoryMiB: 128, Kernel: "/k", Initrd: "/i"}
	if _, err := f.GetVM(t.Context(), good); !errors.Is(err, boom) {
		t.Errorf("GetVM: %v", err)
	}
	if d.got.Name != "pod" {
		t.Errorf("the driver got %+v", d.got)
	}
	d.got = hypervisor.Config{}
	good.VCPUs = 0
	if _, err := f.GetVM(t.Context(), good); err == nil || !strings.Contains(err.Error(), "vcpus") {
		t.Errorf("GetVM: %v", err)
	}
	if d.got.Name != "" {
		t.Error("a bad config reached the driver")
	}
}
