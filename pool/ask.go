package pool

import (
	"context"
	"fmt"
	"time"

	supervisorv1 "github.com/hyperhq/runv/api/supervisor/v1"
)

// Status asks the factory in dir how it is; ErrNone is wrapped if there is none.
func Status(ctx context.Context, dir string) (*supervisorv1.FactoryStatus, error) {
	conn, err := dial(dir)
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	_ = conn.SetDeadline(time.Now().Add(2 * requestTime))
	defer bound(ctx, conn)()
	st := new(supervisorv1.FactoryStatus)
	err = send(conn, &supervisorv1.FactoryRequest{Ask: &supervisorv1.FactoryRequest_Status{Status: &supervisorv1.FactoryStatusRequest{}}})
	if err == nil {
		var fds descriptors
		fds, err = receive(conn, st)
		fds.close()
	}
	if err != nil {
		return nil, fmt.Errorf("ask the factory in %s: %w", dir, why(ctx, err))
	}
	return st, nil
}

// Stop ends the factory in dir and its standbys, and returns when they have
// ended. Without a factory it removes what a killed one has left, and returns an
// error that wraps ErrNone.
func Stop(ctx context.Context, dir string) error {
	conn, err := dial(dir)
	if err != nil {
		clean(dir)
		return err
	}
	defer conn.Close()
	defer bound(ctx, conn)()
	if err := send(conn, &supervisorv1.FactoryRequest{Ask: &supervisorv1.FactoryRequest_Stop{Stop: &supervisorv1.FactoryStopRequest{}}}); err != nil {
		return fmt.Errorf("stop the factory in %s: %w", dir, why(ctx, err))
	}
	// The end of the connection is the answer.
	var nothing supervisorv1.ClaimAnswer
	if fds, err := receive(conn, &nothing); err == nil {
		fds.close()
		return fmt.Errorf("stop the factory in %s: it answered %q", dir, nothing.Refused)
	} else if ctx.Err() != nil {
		return fmt.Errorf("stop the factory in %s: %w", dir, context.Cause(ctx))
	}
	return nil
}
