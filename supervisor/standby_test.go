package supervisor

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
	"github.com/hyperhq/runv/factory"
)

// standby makes one of the pod's fakes.
func (p *pod) standby() *Standby {
	p.t.Helper()
	dir := p.t.TempDir()
	b, err := StartStandby(p.t.Context(), StandbyOptions{
		Name: "standby-1", Dir: dir, Version: "test",
		VM: &supervisorv1.VM{Kernel: p.kernel, Initrd: p.initrd, Vcpus: 1, MemoryMib: 128, Network: "none"},
		Factory: func(context.Context, *supervisorv1.VM) (factory.Factory, string, error) {
			return factory.Direct(p.driver), "fake", nil
		},
		newShare: func(dir string, _ *os.File) (sharer, error) {
			return noShare{}, os.MkdirAll(filepath.Join(dir, shareName), 0o700)
		},
	})
	if err != nil {
		p.t.Fatal(err)
	}
	return b
}

// A standby that nobody has used goes with its pod.
func TestStandbyWithoutCreate(t *testing.T) {
	adopted := make(chan struct{})
	p := newPod(t, func(p *pod) {
		p.s.o.Standby = p.standby()
		p.s.o.Adopted = func() { close(adopted) }
	})
	<-adopted
	if _, err := os.Stat(filepath.Join(p.dir, consoleName)); err != nil && !os.IsNotExist(err) {
		t.Error(err)
	}
	_ = p.life.Close()
	<-p.served
	<-p.vm().Done()
	if n := len(p.driver.VMs()); n != 1 {
		t.Errorf("%d VMs were started", n)
	}
	// Once for its own start, once with fresh entropy for the pod.
	hs := p.agent.Hellos()
	if len(hs) < 2 || string(hs[0].Entropy) == string(hs[len(hs)-1].Entropy) {
		t.Errorf("%d hellos", len(hs))
	}
}
